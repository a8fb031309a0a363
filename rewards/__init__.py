"""Reward functions, one file per reward. Import as `postgen.rewards`; none exists yet."""
