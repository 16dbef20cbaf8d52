"""Model in, model out: find sites, put ports in their place."""
