#!/usr/bin/env bash
# Whether a program finds the CUDA driver's library on this machine: the exit status says it.
set -u

# As the loader looks: the folders of the environment, then its cache.
IFS=: read -ra folders <<<"${LD_LIBRARY_PATH:-}"
for folder in "${folders[@]}"; do
    [[ -n $folder && -e $folder/libcuda.so.1 ]] && exit 0
done
# Not on every user's PATH.
cached=$(PATH=$PATH:/usr/sbin:/sbin ldconfig -p 2>/dev/null)
[[ $cached == *"libcuda.so.1 "* ]]
