"""Looking at a prefix: what a folder holds, how large its vectors are, and how much attention rests on them."""
