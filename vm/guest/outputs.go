package guest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"nbd/nixproto/nar"
	"nbd/vm/link"
)

// An outputError says what is wrong with what the builder left; its text is for
// the user.
type outputError struct {
	kind link.Kind
	msg  string
}

func (e *outputError) Error() string { return e.msg }

func refused(format string, args ...any) error {
	return &outputError{link.OutputRefused, fmt.Sprintf(format, args...)}
}

// checkOutputs judges the outputs as such, as Nix does before it looks into
// them: all must be there, belong to the builder, and not be writable by
// others. The texts are Nix's. root is the sandbox's root directory, in which
// no process is left.
func checkOutputs(root string, order *link.BuildOrder, uid uint32) error {
	for _, o := range order.Outputs {
		var st unix.Stat_t
		err := unix.Lstat(filepath.Join(root, o.Path), &st)
		if errors.Is(err, unix.ENOENT) {
			return &outputError{link.OutputMissing, fmt.Sprintf(
				"builder for '%s' failed to produce output path for output '%s' at \"%s\"", order.DrvPath, o.Name, o.Path)}
		}
		if err != nil {
			return fmt.Errorf("look at output: %w", err)
		}
		open := st.Mode&unix.S_IFMT != unix.S_IFLNK && st.Mode&(unix.S_IWGRP|unix.S_IWOTH) != 0
		if open || st.Uid != uid {
			return refused("suspicious ownership or permission on \"%s\" for output '%s'; rejecting this build output", o.Path, o.Name)
		}
	}
	return nil
}

// A dumper writes one output as a NAR. It follows no symlink: every step goes
// from an open directory to one name in it. It does not recurse.
type dumper struct {
	w    *nar.Writer
	uid  uint32 // to whom all files must belong
	open []openDir
	buf  []byte
}

// An openDir is a directory whose entries are being written.
type openDir struct {
	f     *os.File
	path  string   // for messages: as the builder knows it
	names []string // those to come, sorted
}

// dumpTree writes the object name in the directory parent to w as a NAR. path
// is its name in messages. What a store cannot hold is an *outputError.
func dumpTree(w io.Writer, parent *os.File, name, path string, uid uint32) error {
	d := &dumper{w: nar.NewWriter(w), uid: uid, buf: make([]byte, 256<<10)}
	defer d.closeAll()
	if err := d.entry(parent, name, "", path); err != nil {
		return err
	}
	for len(d.open) > 0 {
		top := &d.open[len(d.open)-1]
		if len(top.names) == 0 {
			if err := d.leave(); err != nil {
				return err
			}
			continue
		}
		name := top.names[0]
		top.names = top.names[1:]
		if err := d.entry(top.f, name, name, top.path+"/"+name); err != nil {
			return err
		}
	}
	return d.w.Close()
}

func (d *dumper) closeAll() {
	for _, o := range d.open {
		o.f.Close() // only read from
	}
}

// entry writes the object name of a directory; as is its name in the NAR.
func (d *dumper) entry(dir *os.File, name, as, path string) error {
	if len(d.open) > nar.MaxDepth {
		return refused("file \"%s\" is nested more than %d levels deep", path, nar.MaxDepth+1)
	}
	var st unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("look at %s: %w", path, err)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFDIR, unix.S_IFLNK:
	default:
		return refused("file \"%s\" has an unsupported type", path)
	}
	if st.Uid != d.uid {
		return refused("invalid ownership on file \"%s\"", path)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return d.enter(dir, name, as, path)
	case unix.S_IFLNK:
		return d.symlink(dir, name, as, path)
	}
	return d.file(dir, name, as, path, &st)
}

func (d *dumper) enter(dir *os.File, name, as, path string) error {
	f, err := openIn(dir, name, path, unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	d.open = append(d.open, openDir{f: f, path: path})
	names, err := f.Readdirnames(-1)
	if err != nil {
		return fmt.Errorf("list %s: %w", path, err)
	}
	slices.Sort(names) // bytewise, as a NAR is
	d.open[len(d.open)-1].names = names
	return d.w.Directory(as)
}

func (d *dumper) leave() error {
	top := d.open[len(d.open)-1]
	d.open = d.open[:len(d.open)-1]
	if err := top.f.Close(); err != nil {
		return fmt.Errorf("close %s: %w", top.path, err)
	}
	return d.w.EndDirectory()
}

func (d *dumper) symlink(dir *os.File, name, as, path string) error {
	n, err := unix.Readlinkat(int(dir.Fd()), name, d.buf)
	if err != nil {
		return fmt.Errorf("read symlink %s: %w", path, err)
	}
	return d.w.Symlink(as, string(d.buf[:n]))
}

func (d *dumper) file(dir *os.File, name, as, path string, st *unix.Stat_t) error {
	f, err := openIn(dir, name, path, 0)
	if err != nil {
		return err
	}
	defer f.Close() // only read from
	if err := d.w.File(as, st.Mode&unix.S_IXUSR != 0, st.Size); err != nil {
		return err
	}
	for rest := st.Size; rest > 0; {
		n, err := f.Read(d.buf[:min(rest, int64(len(d.buf)))])
		if err != nil {
			return fmt.Errorf("read %s: %w", path, err)
		}
		if _, err := d.w.Write(d.buf[:n]); err != nil {
			return err
		}
		rest -= int64(n)
	}
	return nil
}

func openIn(dir *os.File, name, path string, flags int) (*os.File, error) {
	fd, err := unix.Openat(int(dir.Fd()), name, flags|unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// sendOutputs writes all outputs to the sink, in their order, and returns when
// they have arrived.
func sendOutputs(s *sink, root string, order *link.BuildOrder, uid uint32) ([]link.OutputInfo, error) {
	var infos []link.OutputInfo
	for _, o := range order.Outputs {
		parent, err := os.Open(filepath.Join(root, filepath.Dir(o.Path)))
		if err != nil {
			return nil, fmt.Errorf("open store: %w", err)
		}
		err = dumpTree(s, parent, filepath.Base(o.Path), o.Path, uid)
		if err := errors.Join(err, parent.Close()); err != nil {
			return nil, err
		}
		info, err := s.end(o.Name)
		if err != nil {
			return nil, err
		}
		infos = append(infos, info)
	}
	return infos, s.flush()
}
