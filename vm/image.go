package vm

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"sort"

	"nbd/nixproto"
	"nbd/nixproto/nar"
)

// An ImagePath is one store path of an Image.
type ImagePath struct {
	Path nixproto.StorePath
	// NAR holds the path's archive, of Size bytes. It is read from several
	// goroutines at once, and stays open as long as the Image is read.
	NAR  io.ReaderAt
	Size int64
	// Index is the archive's. NewImage does not keep it.
	Index nar.Index
}

// An Image is a read-only EROFS file system whose root directory holds store
// paths by their base names, each a directory, a file or a symbolic link. It
// exists nowhere: the metadata are in memory, and file contents are read from
// the archives when they are asked for. Everything belongs to root, has
// modification time 1, and the modes that Nix gives to what is in its store.
//
// An Image is immutable, and safe for concurrent use.
type Image struct {
	meta   []byte // the blocks before the first file's contents
	files  []imageFile
	nars   []io.ReaderAt
	size   int64
	inodes int
}

// An imageFile is the place of a file's contents: size bytes from a block of
// the image on, zeros after them up to the next file.
type imageFile struct {
	block uint32
	nar   uint32
	off   int64 // in the archive
	size  int64 // more than 0
}

// NewImage lays out the file system of the given paths, in any order. The same
// paths make the same image. An index that is not that of an archive of the
// given size is an error, as are two paths of one name.
func NewImage(paths []ImagePath) (*Image, error) {
	paths = slices.Clone(paths)
	slices.SortFunc(paths, func(a, b ImagePath) int { return cmp.Compare(a.Path, b.Path) })
	l, err := newImageLayout(paths)
	if err != nil {
		return nil, fmt.Errorf("make image: %w", err)
	}
	m := &Image{inodes: len(l.nodes), nars: make([]io.ReaderAt, len(paths))}
	for i := range paths {
		m.nars[i] = paths[i].NAR
	}
	if err := m.build(l); err != nil {
		return nil, fmt.Errorf("make image: %w", err)
	}
	return m, nil
}

// newImageLayout returns the finished layout of paths, which are sorted.
func newImageLayout(paths []ImagePath) (*imageLayout, error) {
	count := 1
	for i := range paths {
		count += len(paths[i].Index)
	}
	l := &imageLayout{nodes: make([]imageNode, 1, count)}
	l.nodes[0] = imageNode{entry: &nar.Entry{Kind: nar.Directory, Depth: -1}, links: 1}
	roots := make([]nar.Entry, len(paths))
	for i := range paths {
		p := &paths[i]
		if len(p.Index) == 0 {
			return nil, fmt.Errorf("%s: empty index", p.Path)
		}
		roots[i] = p.Index[0]
		roots[i].Name = p.Path.Base()
		if err := l.add(&roots[i], p.Index, uint32(i), p.Size); err != nil {
			return nil, fmt.Errorf("%s: %w", p.Path, err)
		}
	}
	if err := l.finish(); err != nil {
		return nil, err
	}
	return l, l.place()
}

// build writes the metadata and lists the files.
func (m *Image) build(l *imageLayout) error {
	files := 0
	for i := range l.nodes {
		if e := l.nodes[i].entry; e.Kind == nar.Regular && e.Size > 0 {
			files++
		}
	}
	m.meta = make([]byte, l.meta)
	m.files = make([]imageFile, 0, files)
	next := l.meta / erofsBlock // the first block that is free for contents
	for i := range l.nodes {
		blocks, err := m.putNode(l, int32(i), next)
		if err != nil {
			return err
		}
		next += blocks
	}
	m.size = next * erofsBlock
	putErofsSuper(m.meta[:erofsBlock], uint16(l.nodes[0].nid), uint64(len(l.nodes)), uint32(next))
	return nil
}

// putNode writes node i and returns how many blocks from next on its contents
// take.
func (m *Image) putNode(l *imageLayout, i int32, next int64) (blocks int64, err error) {
	n := &l.nodes[i]
	contents := uint32(0)
	if e := n.entry; e.Kind == nar.Regular && e.Size > 0 {
		blocks = roundUp(e.Size, erofsBlock) / erofsBlock
		if blocks < 0 || next+blocks > math.MaxUint32-1 {
			return 0, errors.New("contents pass 16 TiB")
		}
		contents = uint32(next)
		m.files = append(m.files, imageFile{contents, n.nar, e.Offset, e.Size})
	}
	inode := n.inode(contents)
	inode.ino = uint32(i) + 1
	at := int64(n.nid) * erofsSlot
	inode.put(m.meta[at:])
	if at += int64(inode.len()); n.block != 0 {
		at = int64(n.block) * erofsBlock
	}
	switch n.entry.Kind {
	case nar.Directory:
		l.putDirectory(m.meta[at:], i)
	case nar.Symlink:
		copy(m.meta[at:], n.entry.Target)
	}
	return blocks, nil
}

// putDirectory writes the blocks of directory d to b: in each the entries, then
// their names.
func (l *imageLayout) putDirectory(b []byte, d int32) {
	entries := l.collect(d)
	for len(entries) > 0 {
		n, _ := direntsInBlock(entries)
		nameOff := n * erofsDirentSize
		for i, e := range entries[:n] {
			node := &l.nodes[e.node]
			putErofsDirent(b[i*erofsDirentSize:], uint64(node.nid), nameOff, node.fileType())
			nameOff += copy(b[nameOff:], e.name)
		}
		if entries = entries[n:]; len(entries) > 0 {
			b = b[erofsBlock:]
		}
	}
}

// Size returns the length of the image in bytes, a multiple of 4096.
func (m *Image) Size() int64 { return m.size }

// Inodes returns the number of files, directories and links, the root of the
// image included.
func (m *Image) Inodes() int { return m.inodes }

// ReadAt implements io.ReaderAt. An error other than io.EOF at the end is that
// of an archive, or tells that one is shorter than it was said to be.
func (m *Image) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, errors.New("read image: negative offset")
	}
	if off >= m.size {
		return 0, io.EOF
	}
	if int64(len(p)) > m.size-off {
		p, err = p[:m.size-off], io.EOF
	}
	if off < int64(len(m.meta)) {
		n = copy(p, m.meta[off:])
	}
	if n == len(p) {
		return n, err
	}
	more, failed := m.readFiles(p[n:], off+int64(n))
	if failed != nil {
		err = failed
	}
	return n + more, err
}

// readFiles fills p from off, which lies in the contents of files or behind
// them in their last block.
func (m *Image) readFiles(p []byte, off int64) (n int, err error) {
	i := sort.Search(len(m.files), func(i int) bool { return int64(m.files[i].block)*erofsBlock > off }) - 1
	for ; n < len(p); i++ {
		f := &m.files[i]
		at := off + int64(n) - int64(f.block)*erofsBlock // in the file
		if have := f.size - at; have > 0 {
			want := p[n:][:min(have, int64(len(p)-n))]
			if err := readFull(m.nars[f.nar], want, f.off+at); err != nil {
				return n, fmt.Errorf("read archive %d of image: %w", f.nar, err)
			}
			n += len(want)
			at += int64(len(want))
		}
		zeros := min(roundUp(f.size, erofsBlock)-at, int64(len(p)-n))
		clear(p[n:][:zeros])
		n += int(zeros)
	}
	return n, nil
}

// readFull fills p from off of r; too few bytes are an error.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	// io.ReaderAt may return io.EOF beside the last bytes.
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("%d bytes at %d: %w", len(p), off, err)
}
