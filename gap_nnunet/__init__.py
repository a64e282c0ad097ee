"""nnU-Net v2 with a folder of scans that have no labels: `gap-nnunet`, and the trainers behind it.

    gap-nnunet prepare -d 5 -c 2d 3d_fullres
    gap-nnunet train 5 2d 0 -tr GapMatchTrainer

The whole way, from an empty folder to a prediction: docs/your_own_scans.md. Beside `gap_torch`, which needs torch
alone, this needs nnunetv2 (`pip install "gap-torch[nnunet]"`). A trainer of one's own derives from those in
`gap_nnunet.fixmatch`, `gap_nnunet.mean_teacher` and `gap_nnunet.unimatch`.
"""
