#!/usr/bin/env bash
# Redirect (GUDA-C) against twelve LOGO models, on glyphs of twelve fonts at 16x16: about half an hour of two CPU cores.
#   benchmarks/agreement/typefaces.sh [FOLDER]
# A group is a font, a condition a font and a glyph: 12 fonts of ten glyphs, and ten labels more for glyphs of no font.
source "$(dirname "$0")/steps.sh" "${1:-runs/agreement/typefaces}"
# Debian has them as fonts-cabin, -cantarell, -comfortaa, -courier-prime, -dejavu, -dosis, -gfs-didot, -inconsolata,
# -kaushanscript, -lato, -lobster and -oldstandard.
fonts="Cabin Regular+Cantarell Regular+Comfortaa Regular+Courier Prime Light+DejaVu Serif Book+Dosis Book"
fonts+="+GFS Didot Regular+Inconsolata Medium+Kaushan Script Regular+Lato Regular+Lobster Two Bold Italic"
fonts+="+Old Standard TT Regular"

base_and_logo "typefaces,fonts=$fonts,glyphs=ABCDEFGHIJ,repeats=16,size=16,conditions=font-glyph" 120 --network small --steps 700
unlearn_and_score redirect base redirect --set anchors=matched --steps 100
evaluate agreement_typefaces redirect
