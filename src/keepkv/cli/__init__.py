"""The command line ``keepkv VERB``: one file per verb, and what they share."""
