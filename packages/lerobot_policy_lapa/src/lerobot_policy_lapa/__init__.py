"""LAPA policies (https://arxiv.org/abs/2410.11758) in LeRobot, whose tools import every distribution of this kind.

lapa export lerobot POLICY --out FOLDER
lerobot-eval --policy.path=FOLDER --env.type=ENVIRONMENT
"""

from lerobot_policy_lapa.configuration_lapa import LapaConfig
from lerobot_policy_lapa.modeling_lapa import LapaPolicy
from lerobot_policy_lapa.processor_lapa import make_lapa_pre_post_processors

__all__ = ["LapaConfig", "LapaPolicy", "make_lapa_pre_post_processors"]
