package builtin

import (
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// maxTarget is the longest target of a symlink in bytes.
const maxTarget = 4095

// An extractor makes the members of an archive below one directory, and nothing
// anywhere else: names with ".." are refused, and the kernel refuses to walk
// through a symlink, or out of the directory, on the way to a member. What is in
// the way of a later member is removed, unless it is a directory with something
// in it; a symlink is never followed.
//
// Modes and times are not kept: of those a store keeps only whether a file may
// be executed.
type extractor struct {
	dir  string // for messages
	root int    // open directory

	// parent is open at parentName, below root; -1 if none is.
	parent     int
	parentName string
	buf        []byte
}

func newExtractor(dir string) (*extractor, error) {
	root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, errorf("opening directory %s: %s", quoted(dir), reason(err))
	}
	return &extractor{dir: dir, root: root, parent: -1, buf: make([]byte, 256<<10)}, nil
}

func (x *extractor) close() {
	x.forget()
	unix.Close(x.root) // only a place
}

// forget closes the directory that is open, if one is.
func (x *extractor) forget() {
	if x.parent >= 0 && x.parent != x.root {
		unix.Close(x.parent) // only a place
	}
	x.parent = -1
}

// A refusal says, in libarchive's words, why a member is not extracted.
type refusal string

func (r refusal) Error() string { return string(r) }

func refusef(format string, args ...any) error { return refusal(fmt.Sprintf(format, args...)) }

// full is a name in messages.
func (x *extractor) full(name string) string { return x.dir + "/" + name }

// cannot says that a member cannot be made.
func (x *extractor) cannot(name string) error {
	return refusef("Can't create '%s'", x.full(strings.TrimLeft(name, "/")))
}

// clean returns a member's name in its shortest form, "." for the directory
// itself.
func clean(name string) (string, error) {
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", refusal("Path contains '..'")
		}
	}
	if strings.Contains(name, "\x00") {
		return "", refusal("Path contains a zero byte")
	}
	return path.Clean(strings.TrimLeft(name, "/")), nil
}

// below opens a directory below the root, as a place.
func (x *extractor) below(name string) (int, error) {
	return unix.Openat2(x.root, name, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	})
}

// enter has the directory of a member open, and returns the member's last name.
// Directories that are not there are made if make is set.
func (x *extractor) enter(name string, make bool) (base string, err error) {
	dir, base := path.Split(name)
	dir = path.Clean(dir)
	if x.parent >= 0 && x.parentName == dir {
		return base, nil
	}
	x.forget()
	if dir == "." {
		x.parent, x.parentName = x.root, dir
		return base, nil
	}
	fd, err := x.below(dir)
	if errors.Is(err, unix.ENOENT) && make {
		fd, err = x.makeDirs(dir)
	}
	switch {
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.EXDEV):
		return "", refusef("Cannot extract through symlink %s", x.full(name))
	case errors.Is(err, unix.ENOTDIR):
		return "", refusef("Could not stat %s", x.full(name))
	case err != nil:
		return "", err
	}
	x.parent, x.parentName = fd, dir
	return base, nil
}

// makeDirs makes a directory and those that it is in, and opens it.
func (x *extractor) makeDirs(name string) (int, error) {
	for i := range len(name) + 1 {
		if i < len(name) && name[i] != '/' {
			continue
		}
		up, err := x.below(path.Dir(name[:i]))
		if err != nil {
			return -1, err
		}
		err = unix.Mkdirat(up, path.Base(name[:i]), 0o777)
		unix.Close(up) // only a place
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return -1, err
		}
	}
	return x.below(name)
}

// put has make make a member that is no directory, in its directory, and takes
// out of the way what is there under its name.
func (x *extractor) put(name string, make func(dir int, base string) error) error {
	name, err := clean(name)
	if err != nil {
		return err
	}
	if name == "." {
		return refusef("Can't replace '%s', which holds the archive", x.dir)
	}
	base, err := x.enter(name, true)
	if isErrno(err) {
		return x.cannot(name)
	}
	if err != nil {
		return err
	}
	err = make(x.parent, base)
	if errors.Is(err, unix.EEXIST) {
		if err := x.remove(base); err != nil {
			return err
		}
		err = make(x.parent, base)
	}
	if isErrno(err) {
		return x.cannot(name)
	}
	return err
}

// isErrno reports whether err is a bare error of the system, which says nothing
// of what it is about.
func isErrno(err error) bool {
	_, ok := err.(unix.Errno)
	return ok
}

// remove removes what is in the open directory.
func (x *extractor) remove(base string) error {
	err := unix.Unlinkat(x.parent, base, 0)
	if errors.Is(err, unix.EISDIR) {
		err = unix.Unlinkat(x.parent, base, unix.AT_REMOVEDIR)
		if err != nil {
			return refusal("Can't replace existing directory with non-directory")
		}
	}
	return err
}

// directory makes a directory, if it is not there.
func (x *extractor) directory(name string) error {
	name, err := clean(name)
	if err != nil || name == "." {
		return err
	}
	if fd, err := x.below(name); err == nil {
		return unix.Close(fd)
	}
	return x.put(name, func(dir int, base string) error { return unix.Mkdirat(dir, base, 0o777) })
}

// file makes a file with the contents that are read from r to its end.
func (x *extractor) file(name string, executable bool, r io.Reader) error {
	mode := uint32(0o666)
	if executable {
		mode = 0o777
	}
	return x.put(name, func(dir int, base string) error {
		fd, err := unix.Openat(dir, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode)
		if err != nil {
			return err
		}
		return x.copy(fd, r)
	})
}

// copy writes what is in r to a file and closes it.
func (x *extractor) copy(fd int, r io.Reader) error {
	err := x.pour(fd, r)
	if cerr := unix.Close(fd); err == nil && cerr != nil {
		err = refusef("Write failed: %s", reason(cerr))
	}
	return err
}

func (x *extractor) pour(fd int, r io.Reader) error {
	for {
		n, err := r.Read(x.buf)
		for rest := x.buf[:n]; len(rest) > 0; {
			done, err := unix.Write(fd, rest)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil {
				return refusef("Write failed: %s", reason(err))
			}
			rest = rest[done:]
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// symlink makes a symlink.
func (x *extractor) symlink(name, target string) error {
	return x.put(name, func(dir int, base string) error { return unix.Symlinkat(target, dir, base) })
}

// fifo makes a named pipe, which a store does not take: it is for the server to
// say so.
func (x *extractor) fifo(name string) error {
	return x.put(name, func(dir int, base string) error { return unix.Mknodat(dir, base, unix.S_IFIFO|0o666, 0) })
}

// link makes another name of a member that was extracted before.
func (x *extractor) link(name, target string) error {
	target, err := clean(target)
	if err != nil {
		return err
	}
	if cleaned, err := clean(name); err != nil {
		return err
	} else if cleaned == target {
		return refusef("Skipping hardlink pointing to itself: %s", x.full(target))
	}
	missing := refusef("Hard-link target '%s' does not exist", x.full(target))
	last, err := x.enter(target, false)
	if errors.Is(err, unix.ENOENT) {
		return missing
	}
	if err != nil {
		return err
	}
	// enter is about to be somewhere else.
	from := x.parent
	if from != x.root {
		x.parent = -1
		defer unix.Close(from) // only a place
	}
	return x.put(name, func(dir int, base string) error {
		err := unix.Linkat(from, last, dir, base, 0) // and does not follow
		if errors.Is(err, unix.ENOENT) {
			return missing
		}
		return err
	})
}
