"""HeadQ in other people's engines, one package each."""
