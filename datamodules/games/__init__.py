"""Games: environments, replay, and the DataModule that plays them."""
