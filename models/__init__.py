"""Recommenders and the language-model backbones that they stand on."""
