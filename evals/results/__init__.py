"""Every number of the documents, from the results stored in recipes/results: ``python -m headq_ao.evals.results``."""
