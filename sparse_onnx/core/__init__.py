"""What every other room builds on: errors, the report, the pass contract and its registry."""
