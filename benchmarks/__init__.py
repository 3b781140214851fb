"""Every performance claim, measured beside its peer in one run, with equal output shown."""
