"""Networks in 8 bits: what of an ONNX graph can run so, Q/DQ nodes around it, ranges, weights rounded by their Gram.

float ONNX ─▶ units (conv + relu, add + relu, pool ...) ─▶ which of them stay float (measured) ─▶ Q/DQ file
              ranges of activations, weights on their grid        from calibration images
"""
