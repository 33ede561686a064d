/* A stand-in for Pyxis, which needs enroot and cannot run here: a SPANK plugin that takes the options that Pyxis adds to
 * srun and does with them what a container would, as far as one machine's own files allow. A task with an image gets a
 * root folder of its own, with all of the machine in it and the asked mounts at their targets, starts in the asked
 * folder, and finds what arrived of the options in STAND_IN_IMAGE, STAND_IN_MOUNTS and STAND_IN_ENV.
 *
 * Build: gcc -shared -fPIC -o container_options.so container_options.c; plugstack.conf: required FOLDER/container_options.so
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <slurm/spank.h>

SPANK_PLUGIN(container_options, 1)

enum { IMAGE, MOUNTS, WORKDIR, ENV, OPTIONS };

static char *given[OPTIONS];
static const char *const shown[OPTIONS] = {"STAND_IN_IMAGE", "STAND_IN_MOUNTS", "STAND_IN_WORKDIR", "STAND_IN_ENV"};

static int take(int option, const char *value, int remote)
{
    (void)remote;
    given[option] = strdup(value);
    return ESPANK_SUCCESS;
}

static struct spank_option options[OPTIONS] = {
    {"container-image", "IMAGE", "image", 1, IMAGE, take},
    {"container-mounts", "SOURCE:TARGET[:FLAGS],...", "mounts", 1, MOUNTS, take},
    {"container-workdir", "FOLDER", "folder in which tasks start", 1, WORKDIR, take},
    {"container-env", "NAME,...", "variables that win over the image's", 1, ENV, take},
};

static int failed(const char *what)
{
    slurm_error("container_options: %s: %m", what);
    return -1;
}

int slurm_spank_init(spank_t spank, int count, char **words)
{
    (void)count, (void)words;
    for (int i = 0; spank_context() != S_CTX_SLURMD && i < OPTIONS; i++)
        if (spank_option_register(spank, &options[i]) != ESPANK_SUCCESS)
            return failed(options[i].name);
    return ESPANK_SUCCESS;
}

/* Show the file or folder `source` as `target`, which is made where it is missing. */
static int show(const char *source, const char *target)
{
    struct stat found;
    char path[PATH_MAX];

    if (stat(source, &found))
        return failed(source);
    snprintf(path, sizeof path, "%s", target);
    for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        mkdir(path, 0755);
        *slash = '/';
    }
    if (S_ISDIR(found.st_mode))
        mkdir(path, 0755);
    else
        fclose(fopen(path, "a"));
    return mount(source, target, NULL, MS_BIND | MS_REC, NULL) ? failed(target) : 0;
}

/* Fill `root` with what lies in the machine's own root folder, itself excepted. */
static int show_machine(const char *root)
{
    char source[PATH_MAX], target[PATH_MAX], link[PATH_MAX];
    DIR *top = opendir("/");

    for (struct dirent *entry; top && (entry = readdir(top));) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..") || !strcmp(entry->d_name, root + 1))
            continue;
        snprintf(source, sizeof source, "/%s", entry->d_name);
        snprintf(target, sizeof target, "%s/%s", root, entry->d_name);
        ssize_t length = readlink(source, link, sizeof link - 1);
        if (length >= 0) {
            link[length] = 0;
            if (symlink(link, target))
                return failed(target);
        } else if (show(source, target))
            return -1;
    }
    return top ? closedir(top) : failed("/");
}

/* As root, in the task: a root folder of its own. */
int slurm_spank_task_init_privileged(spank_t spank, int count, char **words)
{
    const char *root = "/mnt";
    char target[PATH_MAX], *rest = given[MOUNTS] ? strdup(given[MOUNTS]) : NULL;

    (void)count, (void)words;
    if (!given[IMAGE])
        return ESPANK_SUCCESS;
    for (int i = 0; i < OPTIONS; i++)
        spank_setenv(spank, shown[i], given[i] ? given[i] : "", 1);
    if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL))
        return failed("a mount namespace");
    if (mount("container", root, "tmpfs", 0, NULL))
        return failed(root);
    if (show_machine(root))
        return -1;
    for (char *one; (one = strsep(&rest, ","));) {
        char *source = strsep(&one, ":"), *inside = strsep(&one, ":");
        snprintf(target, sizeof target, "%s%s", root, inside ? inside : source);
        if (show(source, target))
            return -1;
    }
    return chroot(root) || chdir("/") ? failed(root) : ESPANK_SUCCESS;
}

/* As the user, right before the task's program. */
int slurm_spank_task_init(spank_t spank, int count, char **words)
{
    (void)spank, (void)count, (void)words;
    return given[IMAGE] && given[WORKDIR] && chdir(given[WORKDIR]) ? failed(given[WORKDIR]) : ESPANK_SUCCESS;
}
