"""Rules about recipes, one file per topic; each raises one sentence with the remedy."""
