"""Where everything that happened is counted, once."""
