# COCO instance segmentation: the detection data set, with masks.
# In the form of the MMDetection that is installed; the values are in ../values.
_base_ = f'../mmdet{__import__("mmdet").__version__[0]}/coco_instance.py'
