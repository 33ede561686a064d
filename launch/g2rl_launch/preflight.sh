# Checks on a login node what a job needs: sh -c TEXT sh FOLDER JOB_FOLDER FILE... "" FILE...
# Prints the checksum of each file before the empty word, and which of those after it (models and data) are present.
# Sent as one line, for any login shell: every command ends in a semicolon, and comments are on separate lines.
folder=$1 jobs=$2 sum=1; shift 2;
for name in sbatch squeue scontrol rsync; do
  command -v "$name" >/dev/null || echo "g2rl command $name";
done;
{ mkdir -p "$jobs" && [ -w "$jobs" ]; } 2>/dev/null || echo "g2rl jobs";
cd "$folder" 2>/dev/null || { echo "g2rl folder"; exit 0; };
for file; do
  case $file in "") sum=; continue;; "~/"*) path=$HOME/${file#"~/"};; *) path=$file;; esac;
  [ -r "$path" ] || continue;
  if [ -z "$sum" ]; then echo "g2rl file - $file";
  elif [ -f "$path" ]; then echo "g2rl file $(sha256sum < "$path" | cut -c 1-64) $file"; fi;
done;
true
