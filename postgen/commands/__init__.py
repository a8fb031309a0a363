"""The commands of the command line, one module each; they parse and print, the work is done elsewhere."""
