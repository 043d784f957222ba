"""Models that take images or sound, as several files: `export(multimodal=True)`."""
