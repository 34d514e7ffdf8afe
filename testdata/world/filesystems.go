package main

import (
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// fileSystems looks at what can be done in each place where a builder writes.
func fileSystems() {
	store, err := os.MkdirTemp("/nix/store", ".world")
	try("make directory in the store", err)
	if err != nil {
		return
	}
	for _, dir := range []string{"/build", "/tmp", "/dev/shm", store} {
		name := dir
		if dir == store {
			name = "store"
		}
		inDirectory(name+": ", dir)
	}
	for _, from := range []string{"/build", "/tmp", store} {
		for _, to := range []string{"/build", "/tmp", store} {
			a, b := from+"/from", to+"/to"
			os.WriteFile(a, nil, 0o644)
			key := strings.ReplaceAll(from+" to "+to, store, "store")
			try("link "+key, os.Link(a, b))
			os.Remove(b)
			try("rename "+key, unix.Rename(a, b))
			os.Remove(a)
			os.Remove(b)
		}
	}
	input := os.Args[0]
	try("link input into the store", os.Link(input, store+"/input"))
	try("link input into /build", os.Link(input, "/build/input"))
	try("write to input", openToWrite(input))
	try("write beside input", openToWrite(filepath.Dir(input)+"/new"))
	try("remove input", os.Remove(input))
	try("rename input", unix.Rename(filepath.Dir(input), store+"/x"))
	try("change mode of input", unix.Chmod(input, 0o777))
	try("touch input", unix.Utimes(input, make([]unix.Timeval, 2)))
	var st unix.Statfs_t
	try("statfs of input", unix.Statfs(input, &st))
	put("input is read-only", "%v", st.Flags&unix.MS_RDONLY != 0)
	try("remove store", os.RemoveAll(store))
	for _, dir := range []string{"/", "/bin", "/dev", "/etc", "/nix", "/proc", "/dev/pts"} {
		try("create in "+dir, openToWrite(filepath.Join(dir, "world")))
	}
	for _, name := range []string{"/etc/passwd", "/etc/group", "/etc/hosts", "/bin/sh"} {
		try("write to "+name, openToWrite(name))
		try("remove "+name, unix.Unlink(name))
	}
}

func openToWrite(name string) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	return f.Close()
}

func inDirectory(key, dir string) {
	file := dir + "/file"
	try(key+"create", os.WriteFile(file, []byte("0123456789"), 0o666))
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err == nil {
		put(key+"created", "mode %o owner %d:%d links %d", st.Mode, st.Uid, st.Gid, st.Nlink)
		put(key+"block size", "%d", st.Blksize)
	}
	try(key+"directory", os.Mkdir(dir+"/dir", 0o777))
	for _, mode := range []uint32{0o4755, 0o2755, 0o6755, 0o1755, 0o000, 0o644} {
		try(key+"chmod "+octal(mode), unix.Chmod(file, mode))
		try(key+"fchmodat "+octal(mode), unix.Fchmodat(unix.AT_FDCWD, file, mode, 0))
	}
	for _, mode := range []uint32{0o2755, 0o1777, 0o755} {
		try(key+"chmod directory "+octal(mode), unix.Chmod(dir+"/dir", mode))
	}
	try(key+"mkdir with setgid", unix.Mkdir(dir+"/gid", 0o2755))
	if err := unix.Stat(dir+"/gid", &st); err == nil {
		put(key+"made with setgid", "mode %o", st.Mode)
	}
	fd, err := unix.Open(dir+"/suid", unix.O_CREAT|unix.O_WRONLY, 0o4755)
	try(key+"create with setuid", err)
	if err == nil {
		unix.Fstat(fd, &st)
		put(key+"created with setuid", "mode %o", st.Mode)
		unix.Close(fd)
	}
	try(key+"chown to self", unix.Chown(file, os.Getuid(), os.Getgid()))
	try(key+"chown to nothing", unix.Chown(file, -1, -1))
	try(key+"chown to root", unix.Chown(file, 0, 0))
	try(key+"chown to unmapped", unix.Chown(file, 1, -1))
	try(key+"chgrp to unmapped", unix.Chown(file, -1, 1))
	for _, a := range []string{"user.x", "security.capability", "trusted.x", "system.posix_acl_access"} {
		try(key+"setxattr "+a, unix.Setxattr(file, a, []byte("x"), 0))
		_, err := unix.Getxattr(file, a, make([]byte, 10))
		try(key+"getxattr "+a, err)
		try(key+"removexattr "+a, unix.Removexattr(file, a))
	}
	n, err := unix.Listxattr(file, make([]byte, 100))
	put(key+"listxattr", "%d %s", n, outcome(err))
	n, err = unix.Llistxattr(file, nil)
	put(key+"llistxattr", "%d %s", n, outcome(err))
	for _, m := range []struct {
		name string
		mode uint32
	}{{"pipe", unix.S_IFIFO}, {"socket", unix.S_IFSOCK}, {"character device", unix.S_IFCHR}, {"block device", unix.S_IFBLK}, {"file", unix.S_IFREG}} {
		try(key+"mknod "+m.name, unix.Mknod(dir+"/node-"+m.name, m.mode|0o600, int(unix.Mkdev(1, 3))))
	}
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		try(key+"open", err)
		return
	}
	defer f.Close()
	d := int(f.Fd())
	try(key+"allocate", unix.Fallocate(d, 0, 0, 65536))
	try(key+"punch hole", unix.Fallocate(d, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096))
	try(key+"collapse", unix.Fallocate(d, unix.FALLOC_FL_COLLAPSE_RANGE, 0, 4096))
	try(key+"large sparse file", f.Truncate(1<<40))
	hole, err := unix.Seek(d, 0, unix.SEEK_HOLE)
	put(key+"seek hole", "%v %s", hole >= 0, outcome(err))
	try(key+"fsync", f.Sync())
	try(key+"lock", unix.Flock(d, unix.LOCK_EX))
	try(key+"posix lock", unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}))
	try(key+"lease", leaseOf(d))
	flags, err := unix.IoctlGetUint32(d, 0x80086601)
	put(key+"file flags", "%#x %s", flags&^0x80000, outcome(err)) // but extents
	try(key+"immutable", unix.IoctlSetPointerInt(d, 0x40086602, 0x10))
	try(key+"clone file", unix.IoctlFileClone(d, d))
	tmp, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR, 0o644)
	try(key+"nameless file", err)
	if err == nil {
		try(key+"name it", unix.Linkat(unix.AT_FDCWD, procFD(tmp), unix.AT_FDCWD, dir+"/named", unix.AT_SYMLINK_FOLLOW))
		unix.Close(tmp)
	}
	direct, err := unix.Open(file, unix.O_DIRECT|unix.O_RDONLY, 0)
	try(key+"direct", err)
	if err == nil {
		unix.Close(direct)
	}
	try(key+"symlink", os.Symlink("nowhere", dir+"/symlink"))
	try(key+"link to symlink", os.Link(dir+"/symlink", dir+"/symlink2"))
	try(key+"exchange", unix.Renameat2(unix.AT_FDCWD, dir+"/symlink", unix.AT_FDCWD, file, unix.RENAME_EXCHANGE))
	try(key+"exchange back", unix.Renameat2(unix.AT_FDCWD, dir+"/symlink", unix.AT_FDCWD, file, unix.RENAME_EXCHANGE))
	try(key+"no replacement", unix.Renameat2(unix.AT_FDCWD, dir+"/symlink", unix.AT_FDCWD, file, unix.RENAME_NOREPLACE))
	try(key+"whiteout", unix.Renameat2(unix.AT_FDCWD, dir+"/symlink2", unix.AT_FDCWD, dir+"/white", unix.RENAME_WHITEOUT))
	try(key+"name of 255 bytes", os.WriteFile(dir+"/"+strings.Repeat("n", 255), nil, 0o644))
	try(key+"name of 256 bytes", os.WriteFile(dir+"/"+strings.Repeat("n", 256), nil, 0o644))
	try(key+"name of any bytes", os.WriteFile(dir+"/\xff\x01\n", nil, 0o644))
	try(key+"two cases", os.Mkdir(dir+"/DIR", 0o755))
	try(key+"nanoseconds", unix.UtimesNanoAt(unix.AT_FDCWD, file, []unix.Timespec{{Sec: 5, Nsec: 123456789}, {Sec: 7, Nsec: 987654321}}, 0))
	if err := unix.Stat(file, &st); err == nil {
		put(key+"times", "%d.%09d %d.%09d", st.Atim.Sec, st.Atim.Nsec, st.Mtim.Sec, st.Mtim.Nsec)
	}
	for _, year := range []int64{-1 << 31, 1<<31 + 5, 1 << 33} {
		err := unix.UtimesNanoAt(unix.AT_FDCWD, file, []unix.Timespec{timespec(year), timespec(year)}, 0)
		unix.Stat(file, &st)
		put(key+"time "+decimal(year), "%v %s", int64(st.Mtim.Sec) == year, outcome(err))
	}
	handle, _, err := unix.NameToHandleAt(unix.AT_FDCWD, file, 0)
	put(key+"file handle", "%v %s", handle.Size() > 0, outcome(err))
	inotify, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err == nil {
		_, err = unix.InotifyAddWatch(inotify, dir, unix.IN_ALL_EVENTS)
		unix.Close(inotify)
	}
	try(key+"watch", err)
	many := 0
	for ; many < 100; many++ {
		if os.Link(file, dir+"/dir/link-"+decimal(int64(many))) != nil {
			break
		}
	}
	put(key+"hard links", "%d", many)
	try(key+"clean", clean(dir))
}

func clean(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if n := e.Name(); n == "status" || n == "limits" || n == "fds" || strings.HasPrefix(n, ".") || strings.HasPrefix(n, "env-vars") {
			continue
		}
		if err := os.RemoveAll(dir + "/" + e.Name()); err != nil {
			return err
		}
	}
	return nil
}

func leaseOf(fd int) error {
	_, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_WRLCK)
	if err == nil {
		unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_UNLCK)
	}
	return err
}

func procFD(fd int) string { return "/proc/self/fd/" + decimal(int64(fd)) }
