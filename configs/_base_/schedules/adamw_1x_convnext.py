# The 1x schedule with ConvNeXt's layer-wise learning-rate decay.
# In the form of the MMDetection that is installed; the values are in ../values.
_base_ = f'../mmdet{__import__("mmdet").__version__[0]}/adamw_1x_convnext.py'
