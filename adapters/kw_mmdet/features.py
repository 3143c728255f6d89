"""The features of a timm network, which the backbone is made of; they live in :mod:`kw_timm.pyramid`."""

from kw_timm.pyramid import PyramidFeatures, create_network

__all__ = ['PyramidFeatures', 'create_network']
