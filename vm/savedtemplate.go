package vm

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A template on the disk outlives the server: to read one takes a fraction of a
// second, to make one a few seconds, many with emulation. Guests never run from
// the file. It is read into memory that only we have, and counts if all of it has
// the hash at its end.
//
// The file is savedMagic; the length of the header, a 32-bit number with its
// lowest byte first; the header, a savedHeader in JSON; QEMU's state; the parts
// of memory and those of the scratch disk; and the SHA-256 of everything before
// it. Its name is the template's id, and the time of its last change that of when
// it was last read.

// templatesDir is where in the state directory they lie.
const templatesDir = "templates"

const (
	savedMagic = "nbd template 2\n"
	savedNew   = ".new-" // begins the name of one that is being written
	// Bounds of what is believed of a file.
	maxSavedHeader = 8 << 20
	maxSavedState  = 256 << 20
	maxSavedDisk   = 256 << 20
)

// A savedHeader says what a file holds.
type savedHeader struct {
	ID                           string
	Arch                         string
	VCPUs, MemoryMiB, ScratchGiB int
	KVM, OnDemand                bool
	State                        int64 // bytes
	Memory, Disk                 parts
}

// parts are the offset and the length of what is not empty of a file, rising.
type parts [][2]int64

// partsOf returns those of the first size bytes of a file.
func partsOf(f *os.File, size int64) (all parts, err error) {
	err = eachData(f, size, func(off, n int64) error {
		all = append(all, [2]int64{off, n})
		return nil
	})
	return all, err
}

// fit reports whether they can be those of a file of so many bytes.
func (all parts) fit(size int64) bool {
	end := int64(0)
	for _, p := range all {
		if p[0] < end || p[1] < 1 || p[0] > size || p[1] > size-p[0] {
			return false
		}
		end = p[0] + p[1]
	}
	return true
}

// sum returns how many bytes they have.
func (all parts) sum() (n int64) {
	for _, p := range all {
		n += p[1]
	}
	return n
}

// errNotSaved says that a file is not what it should be.
var errNotSaved = errors.New("damaged")

// size returns how long a file with the header is, whose JSON has so many bytes.
func (h *savedHeader) size(header int) int64 {
	return int64(len(savedMagic)+4+header) + h.State + h.Memory.sum() + h.Disk.sum() + sha256.Size
}

// check refuses what no file of ours says.
func (h *savedHeader) check() error {
	if h.MemoryMiB < 1 || h.MemoryMiB > slices.Max(memoryClasses) || h.ScratchGiB < 1 || h.ScratchGiB > MaxScratchMiB>>10 ||
		h.VCPUs < 1 || h.State < 1 || h.State > maxSavedState {
		return fmt.Errorf("%w: its sizes cannot be", errNotSaved)
	}
	if !h.Memory.fit(int64(h.MemoryMiB)<<20) || !h.Disk.fit(int64(h.ScratchGiB)<<30) || h.Disk.sum() > maxSavedDisk {
		return fmt.Errorf("%w: its memory or its disk cannot be", errNotSaved)
	}
	return nil
}

// machine returns the machine of a saved template on a platform, the one with
// the same sizes.
func (h *savedHeader) machine(p *platform) machine {
	return machine{arch: p.arch, accel: p.accel, tscKHz: p.tscKHz,
		vcpus: h.VCPUs, memoryMiB: h.MemoryMiB, scratchGiB: h.ScratchGiB, kvm: h.KVM, onDemand: h.OnDemand}
}

// encodeTemplate writes a template as a file.
func encodeTemplate(w io.Writer, id string, m machine, t *template) error {
	h := savedHeader{ID: id, Arch: m.arch.name, VCPUs: m.vcpus, MemoryMiB: m.memoryMiB, ScratchGiB: m.scratchGiB, KVM: m.kvm, OnDemand: m.onDemand}
	info, err := t.state.Stat()
	if err != nil {
		return err
	}
	h.State = info.Size()
	if h.Memory, err = partsOf(t.ram, int64(m.memoryMiB)<<20); err != nil {
		return err
	}
	if h.Disk, err = partsOf(t.disk, int64(m.scratchGiB)<<30); err != nil {
		return err
	}
	text, err := json.Marshal(&h)
	if err != nil {
		return err
	}
	sum := sha256.New()
	to := io.MultiWriter(w, sum)
	head := binary.LittleEndian.AppendUint32([]byte(savedMagic), uint32(len(text)))
	if _, err := to.Write(append(head, text...)); err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	err = h.each(t, func(f *os.File, off, n int64) error {
		_, err := io.CopyBuffer(to, io.NewSectionReader(f, off, n), buf)
		return err
	})
	if err != nil {
		return err
	}
	_, err = w.Write(sum.Sum(nil))
	return err
}

// each calls f for each part of a template's files, in the order of the file.
func (h *savedHeader) each(t *template, f func(file *os.File, off, n int64) error) error {
	for _, of := range []struct {
		file *os.File
		all  parts
	}{{t.state, parts{{0, h.State}}}, {t.ram, h.Memory}, {t.disk, h.Disk}} {
		for _, p := range of.all {
			if err := f(of.file, p[0], p[1]); err != nil {
				return err
			}
		}
	}
	return nil
}

// A savedReader reads a file and hashes what it reads.
type savedReader struct {
	r   io.Reader // of the file
	sum hash.Hash
}

func (r *savedReader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	r.sum.Write(p[:n])
	return n, err
}

// readHeader reads the start of a file of so many bytes.
func (r *savedReader) readHeader(size int64) (*savedHeader, error) {
	head := make([]byte, len(savedMagic)+4)
	if _, err := io.ReadFull(r, head); err != nil {
		return nil, fmt.Errorf("%w: %w", errNotSaved, err)
	}
	length := binary.LittleEndian.Uint32(head[len(savedMagic):])
	if string(head[:len(savedMagic)]) != savedMagic || length > maxSavedHeader || int64(length) > size {
		return nil, fmt.Errorf("%w: it does not begin as a template", errNotSaved)
	}
	text := make([]byte, length)
	if _, err := io.ReadFull(r, text); err != nil {
		return nil, fmt.Errorf("%w: %w", errNotSaved, err)
	}
	var h savedHeader
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&h); err != nil {
		return nil, fmt.Errorf("%w: %w", errNotSaved, err)
	}
	if err := h.check(); err != nil {
		return nil, err
	}
	if h.size(len(text)) != size {
		return nil, fmt.Errorf("%w: it has %d bytes and not %d", errNotSaved, size, h.size(len(text)))
	}
	return &h, nil
}

// decodeTemplate reads the template with that id from a file of so many bytes. If
// anything in it is not as it was written, the error wraps errNotSaved.
func decodeTemplate(file io.Reader, size int64, id string) (_ *template, err error) {
	r := &savedReader{file, sha256.New()}
	h, err := r.readHeader(size)
	if err != nil {
		return nil, err
	}
	if h.ID != id {
		return nil, fmt.Errorf("%w: it is another one", errNotSaved)
	}
	t, err := newTemplate(h.MemoryMiB, h.ScratchGiB)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			t.release()
		}
	}()
	buf := make([]byte, 1<<20)
	err = h.each(t, func(f *os.File, off, n int64) error {
		got, err := io.CopyBuffer(io.NewOffsetWriter(f, off), io.LimitReader(r, n), buf)
		if err == nil && got < n {
			err = fmt.Errorf("%w: %w", errNotSaved, io.ErrUnexpectedEOF)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	want := make([]byte, sha256.Size)
	if _, err := io.ReadFull(file, want); err != nil {
		return nil, fmt.Errorf("%w: %w", errNotSaved, err)
	}
	if !bytes.Equal(want, r.sum.Sum(nil)) {
		return nil, fmt.Errorf("%w: its hash is another", errNotSaved)
	}
	return t, t.seal()
}

// A templateStore is the folder of saved templates.
type templateStore struct {
	dir    string
	budget int64 // bytes of all of them
}

// newSavedTemplates returns the folder of templates in a state directory.
func newSavedTemplates(state string, budget int64) *templateStore {
	return &templateStore{dir: filepath.Join(state, templatesDir), budget: budget}
}

func (s *templateStore) path(id string) string { return filepath.Join(s.dir, id) }

// load reads a template; an error that wraps os.ErrNotExist says that there is
// none.
func (s *templateStore) load(id string) (*template, error) {
	f, size, err := openOwn(s.path(id))
	if err != nil {
		return nil, fmt.Errorf("read template: %w", err)
	}
	defer f.Close()
	t, err := decodeTemplate(f, size, id)
	if err != nil {
		return nil, fmt.Errorf("read template: %w", err)
	}
	now := time.Now()
	if err := os.Chtimes(s.path(id), now, now); err != nil {
		t.release()
		return nil, fmt.Errorf("read template: %w", err)
	}
	return t, nil
}

// openOwn opens a regular file that nobody but us may touch.
func openOwn(path string) (_ *os.File, size int64, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err == nil && (!info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0 || int(info.Sys().(*syscall.Stat_t).Uid) != os.Geteuid()) {
		err = fmt.Errorf("%w: others could have written it", errNotSaved)
	}
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, info.Size(), nil
}

// save writes a template, durable when it returns, and removes what is too much.
func (s *templateStore) save(id string, m machine, t *template) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("save template: %w", err)
		}
	}()
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	if err := s.room(t.bytes()); err != nil {
		return err
	}
	f, err := os.CreateTemp(s.dir, savedNew) // with mode 0600
	if err != nil {
		return err
	}
	err = encodeTemplate(f, id, m, t)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), s.path(id))
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return errors.Join(syncDir(s.dir), s.trim(id))
}

// room says why a file of so many bytes is not to be written: it shall take no more
// than a quarter of what is free.
func (s *templateStore) room(bytes int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(s.dir, &st); err != nil {
		return err
	}
	if free := int64(st.Bavail) * st.Bsize; bytes > free/4 {
		return fmt.Errorf("it takes %d MiB, and %d MiB are free", bytes>>20, free>>20)
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// remove removes a template, if it is there.
func (s *templateStore) remove(id string) error {
	if err := os.Remove(s.path(id)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove template: %w", err)
	}
	return nil
}

// A savedFile is a file in the folder.
type savedFile struct {
	name string
	size int64
	used time.Time
}

// list returns what is in the folder, the one used last first.
func (s *templateStore) list() ([]savedFile, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("list templates: %w", err)
	}
	var files []savedFile
	for _, e := range entries {
		if info, err := e.Info(); err == nil {
			files = append(files, savedFile{e.Name(), info.Size(), info.ModTime()})
		}
	}
	slices.SortFunc(files, func(a, b savedFile) int { return b.used.Compare(a.used) })
	return files, nil
}

// trim removes those that were not used for the longest time until the rest fits
// into the budget; not the one named, and not those being written now.
func (s *templateStore) trim(keep string) error {
	files, err := s.list()
	if err != nil {
		return err
	}
	var sum int64
	var errs []error
	for _, f := range files {
		sum += f.size
		unfinished := strings.HasPrefix(f.name, savedNew)
		if f.name == keep || unfinished && time.Since(f.used) < time.Hour {
			continue
		}
		if unfinished || sum > s.budget {
			errs = append(errs, s.remove(f.name))
		}
	}
	return errors.Join(errs...)
}

// header reads what a file says it holds.
func (s *templateStore) header(name string) (*savedHeader, error) {
	f, size, err := openOwn(s.path(name))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	h, err := (&savedReader{f, sha256.New()}).readHeader(size)
	if err == nil && h.ID != name {
		err = fmt.Errorf("%w: it is another one", errNotSaved)
	}
	return h, err
}
