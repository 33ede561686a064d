# Checks on a login node what a job needs, and prints every problem after "g2rl": sh -c TEXT sh HOST FOLDER JOB_FOLDER
# NUMBER, NUMBER times (CONFIGURATION_FILE SHA256 LOCAL_FILE), and KEY=FILE of each file that the configuration names.
# Sent as one line, for any login shell: every command ends in a semicolon, and comments are on separate lines.
host=$1 folder=$2 jobs=$3 number=$4; shift 4;
problem() { printf "g2rl %s\n" "$*"; };
for name in sbatch squeue scontrol rsync; do
  command -v "$name" >/dev/null || problem "$name is not on PATH in a non-interactive shell there: set PATH in ~/.bashrc";
done;
{ mkdir -p "$jobs" && [ -w "$jobs" ]; } 2>/dev/null || problem "tunnel.job_folder: $jobs cannot be created or written there";
cd "$folder" 2>/dev/null || { problem "folder: $folder does not exist there, or cannot be entered"; exit 0; };
while [ "$number" -gt 0 ]; do
  remedy="copy it (scp $3 $host:$1), or set packager: git";
  if [ ! -f "$1" ] || [ ! -r "$1" ]; then
    problem "$1, the configuration that jobs read, does not exist there: $remedy";
  elif [ "$(sha256sum < "$1" | cut -c 1-64)" != "$2" ]; then problem "$1 differs from the local $3: $remedy"; fi;
  shift 3; number=$((number - 1));
done;
for named; do
  path=${named#*=};
  case $path in "~/"*) path=$HOME/${path#"~/"};; esac;
  [ -r "$path" ] || problem "$named: there is no such file or folder on $host (relative paths start at $folder)";
done;
true
