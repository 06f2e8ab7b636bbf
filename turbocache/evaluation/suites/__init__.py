"""`turbocache eval --suite`: what users see break, measured against the same model with a full-precision cache.

    drift      long greedy answers: where they leave those of full precision, and whether they loop
    facts      several facts of a long context in one answer
    sums       sums of numbers from the context; copies of numbers, identifiers and URLs
    arguments  a tool call's arguments copied from the context, free and under a grammar
    cycles     spill, restore, fork, edit and rotate ten times, against a fresh prefill of the same tokens

All prompts come from the seed and the text. Every answer is greedy.
"""
