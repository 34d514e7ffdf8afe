package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"sort"
	"strings"

	"golang.org/x/sys/unix"
)

// files prints every file outside of /proc and of the inputs.
func files() {
	for _, dir := range []string{"/", "/bin", "/build", "/dev", "/dev/pts", "/dev/shm", "/etc", "/nix", "/nix/store", "/tmp", "/sys", "/etc/ssl/certs"} {
		entries, err := os.ReadDir(dir)
		try("dir "+dir, err)
		describe(dir)
		for _, e := range entries {
			describe(filepath.Join(dir, e.Name()))
		}
	}
	texts, err := filepath.Glob("/etc/*")
	attrs, err2 := filepath.Glob("/build/.attr*")
	try("search for texts", errors.Join(err, err2))
	for _, name := range append(texts, attrs...) {
		if info, err := os.Stat(name); err == nil && info.Mode().IsRegular() {
			put("text "+name, "%s", text(name))
		}
	}
	entries, err := os.ReadDir("/proc")
	try("dir /proc", err)
	describe("/proc")
	for _, e := range entries {
		if name := e.Name(); strings.Trim(name, "0123456789") != "" && !strings.HasSuffix(name, "self") {
			describe("/proc/" + name)
		}
	}
	input := os.Args[0]
	for _, p := range []string{filepath.Dir(input), input} {
		var st unix.Stat_t
		err := unix.Lstat(p, &st)
		put("input "+filepath.Base(p), "mode %o uid %d gid %d mtime %d.%09d %s", st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec, outcome(err))
	}
}

// describe prints what lstat says of a path.
func describe(path string) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		try("stat "+path, err)
		return
	}
	value := fmt.Sprintf("mode %o owner %d:%d", st.Mode, st.Uid, st.Gid)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFCHR, unix.S_IFBLK:
		value += fmt.Sprintf(" device %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	case unix.S_IFLNK:
		to, err := os.Readlink(path)
		value += fmt.Sprintf(" to %s %s", to, outcome(err))
	case unix.S_IFREG:
		// The shell's notes are as long as the machine has them.
		if !strings.HasPrefix(path, "/proc/") && path != "/bin/sh" && (filepath.Dir(path) != "/build" || strings.HasPrefix(path, "/build/.")) {
			value += fmt.Sprintf(" size %d", st.Size)
		}
	}
	put("stat "+path, "%s", value)
}

var storeHash = regexp.MustCompile(`/[0-9a-z]{32}-`)

// mounts prints each mount by its place; what the machine's disks decide has
// keys of its own.
func mounts() {
	lines := strings.Split(text("/proc/self/mountinfo"), "\n")
	sort.Strings(lines)
	for _, line := range lines {
		f := strings.Fields(line)
		if len(f) < 10 {
			continue
		}
		place, dash := f[4], 6
		for f[dash] != "-" {
			dash++
		}
		key := "mount " + storeHash.ReplaceAllString(place, "/HASH-")
		optional := regexp.MustCompile(`:\d+`).ReplaceAllString(strings.Join(f[6:dash], " "), "")
		put(key, "%s [%s]", f[5], optional)
		put(key+" type", "%s", f[dash+1])
		put(key+" super", "%s", f[dash+3])
		put(key+" root", "%s", f[3])
		put(key+" source", "%s", f[dash+2])
		var fs unix.Statfs_t
		if err := unix.Statfs(place, &fs); err == nil {
			put(key+" space", "block %d namelen %d", fs.Bsize, fs.Namelen)
		}
	}
	put("mounts", "%d", len(lines))
}
