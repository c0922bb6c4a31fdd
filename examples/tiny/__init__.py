"""The tiny setting: a 1.5M-parameter MoE, four exactly verifiable domains, and the corpus made from them."""
