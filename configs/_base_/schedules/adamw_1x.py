# 12 epochs at batch 16 (8 GPUs x 2 images).
# In the form of the MMDetection that is installed; the values are in ../values.
_base_ = f'../mmdet{__import__("mmdet").__version__[0]}/adamw_1x.py'
