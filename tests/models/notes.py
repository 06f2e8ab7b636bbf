"""What has to be said about single architectures."""

NOTES = {
    "bitnet": "its ternary layers, which exist for Metal only, are replaced by linear ones here",
    "falcon_h1": "attention stands in a `CacheList` beside the recurrent state",
    "gemma2": "its soft cap on attention's scores is computed by the model",
    "gemma3n": "later layers read the keys of an earlier one again",
    "gemma4": "later layers attend to an earlier one's cache",
    "gemma4_text": "later layers attend to an earlier one's cache",
    "gpt_oss": "attention sinks",
    "mimo_v2_flash": "attention sinks in the sliding-window layers; keys of 32 and values of 16 dims",
    "muse_spark": "every layer is a Metal kernel, so a CPU can't say",
    "olmo": "mlx-lm's module adds the mask's name to the scores: prompts of more than one token fail",
    "plamo": "it repeats its keys for all heads",
    "plamo2": "it calls MLX's attention directly",
}
