"""One module per kind of provider; each class in here is an Upstream."""
