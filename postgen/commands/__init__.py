"""The commands of the command line, with one module for each. They only parse options and print results."""
