"""What exporters make of sparse models: transformers' architectures, and modules as people write them."""
