"""The embedded world: a small model, its SAEs and a dataset that ship with actstore, and the demo that asks them."""

from .run import DemoAnswer, DemoAssets, assets, demo_answers, extract_demo

__all__ = ["DemoAnswer", "DemoAssets", "assets", "demo_answers", "extract_demo"]
