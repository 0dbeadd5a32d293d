"""Problems and examples, their encoding, batches and order, and what is run of a completion.

Nothing is imported here: jobs are checked and submitted without torch, and ask which data sets a config needs.
"""
