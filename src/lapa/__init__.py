"""Latent Action Pretraining (LAPA, Ye et al., ICLR 2025, https://arxiv.org/abs/2410.11758).

From videos without action labels to a robot policy. `lapa --help` lists the stages in their order.
"""

__version__ = "0.1.0"
