"""Stands in for Colab's own package: only what the kit calls, with Colab's names and errors."""
