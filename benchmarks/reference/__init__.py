"""The reference as worker, client and serving stack; these modules run in the references' own environments."""
