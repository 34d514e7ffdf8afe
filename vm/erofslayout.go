package vm

import (
	"errors"
	"fmt"
	"math"
	"strings"

	"nbd/nixproto/nar"
)

// maxImageMeta bounds the bytes of an image's metadata, which are in memory. It
// is enough for some 30 million files.
const maxImageMeta = 2 << 30

// An imageLayout decides where everything of an image lies: first the
// superblock and the inodes, in the order of the archives, each followed by the
// directory entries or the target of a link if they fit into the same block;
// then the blocks of larger directories and targets; all this is metadata, kept
// in memory. Then the files' contents, which are not: only their ranges.
//
// The tails of files are not put beside their inodes, unlike mkfs.erofs does:
// dense inodes make a walk over the tree twice as fast.
type imageLayout struct {
	nodes []imageNode // 0 is the image's root
	meta  int64       // bytes of metadata, known after place
	// entries is what collect returned last.
	entries []imageDirent
}

// An imageNode is one inode to be.
type imageNode struct {
	entry  *nar.Entry
	parent int32  // the root's is the root
	end    int32  // the node that follows the last one below this one
	nid    uint32 // place of the inode in slots
	block  uint32 // of a directory or link that is not inline; else 0
	size   uint32 // of a directory, in bytes
	links  uint32
	nar    uint32 // number of the archive
}

// An imageDirent is one entry of a directory.
type imageDirent struct {
	name string
	node int32
}

// add appends the entries of the archive number which, of narSize bytes, below
// the root of the image. root is a copy of the index's first entry with the name that it
// has in the image.
func (l *imageLayout) add(root *nar.Entry, index nar.Index, which uint32, narSize int64) error {
	if len(index) > math.MaxInt32-len(l.nodes) {
		return errors.New("too many files")
	}
	first := int32(len(l.nodes))
	for i := range index {
		e := &index[i]
		if i == 0 {
			e = root
		}
		if err := checkEntry(e, narSize); err != nil {
			return fmt.Errorf("entry %d: %w", i, err)
		}
		parent, err := l.parent(first, e.Depth)
		if err != nil {
			return fmt.Errorf("entry %d: %w", i, err)
		}
		l.nodes = append(l.nodes, imageNode{entry: e, parent: parent, links: 1, nar: which})
	}
	return nil
}

// parent returns the directory that the next node belongs to, which has the
// given depth in the archive that begins with the node first.
func (l *imageLayout) parent(first int32, depth int) (int32, error) {
	last := int32(len(l.nodes)) - 1
	if last < first || depth < 1 {
		if last < first && depth == 0 {
			return 0, nil
		}
		return 0, fmt.Errorf("depth %d out of place", depth)
	}
	for l.nodes[last].entry.Depth >= depth {
		last = l.nodes[last].parent
	}
	if e := l.nodes[last].entry; e.Depth != depth-1 || e.Kind != nar.Directory {
		return 0, fmt.Errorf("depth %d below a %v of depth %d", depth, e.Kind, e.Depth)
	}
	return last, nil
}

// checkEntry refuses what would not make a sound file system, or reach beyond
// the archive.
func checkEntry(e *nar.Entry, narSize int64) error {
	if e.Name == "" || len(e.Name) > erofsMaxName || strings.ContainsAny(e.Name, "/\x00") {
		return fmt.Errorf("bad name %.80q", e.Name)
	}
	switch e.Kind {
	case nar.Directory:
	case nar.Regular:
		if e.Size < 0 || e.Offset < 0 || e.Size > narSize || e.Offset > narSize-e.Size {
			return fmt.Errorf("%d bytes at %d of an archive of %d", e.Size, e.Offset, narSize)
		}
	case nar.Symlink:
		if e.Target == "" || len(e.Target) > erofsMaxTarget || strings.IndexByte(e.Target, 0) >= 0 {
			return fmt.Errorf("bad target of %d bytes", len(e.Target))
		}
	default:
		return fmt.Errorf("unknown %v", e.Kind)
	}
	return nil
}

// finish computes what depends on all nodes: ends, and sizes and links of
// directories.
func (l *imageLayout) finish() error {
	for i := int32(len(l.nodes)) - 1; i >= 0; i-- {
		n := &l.nodes[i]
		n.end = max(n.end, i+1)
		if p := &l.nodes[n.parent]; p != n {
			p.end = max(p.end, n.end)
			if n.entry.Kind == nar.Directory {
				p.links++
			}
		}
		if n.entry.Kind == nar.Directory {
			n.links++
		}
	}
	for i := range l.nodes {
		if l.nodes[i].entry.Kind != nar.Directory {
			continue
		}
		if err := l.measure(int32(i)); err != nil {
			return err
		}
	}
	return nil
}

// collect returns the entries of directory d, "." and ".." among them in their
// place in the order of bytes. They are valid until the next call.
func (l *imageLayout) collect(d int32) []imageDirent {
	dots := []imageDirent{{".", d}, {"..", l.nodes[d].parent}}
	out := l.entries[:0]
	for c := d + 1; c < l.nodes[d].end; c = l.nodes[c].end {
		name := l.nodes[c].entry.Name
		for len(dots) > 0 && dots[0].name < name {
			out, dots = append(out, dots[0]), dots[1:]
		}
		out = append(out, imageDirent{name, c})
	}
	l.entries = append(out, dots...)
	return l.entries
}

// measure checks the order of the entries of directory d and sets its size.
func (l *imageLayout) measure(d int32) error {
	entries := l.collect(d)
	size := int64(0)
	for i := 0; i < len(entries); {
		n, used := direntsInBlock(entries[i:])
		if i += n; i < len(entries) {
			used = erofsBlock
		}
		size += int64(used)
	}
	for i := 1; i < len(entries); i++ {
		if entries[i-1].name >= entries[i].name {
			return fmt.Errorf("entry %.80q follows %.80q", entries[i].name, entries[i-1].name)
		}
	}
	if size > maxImageMeta {
		return fmt.Errorf("a directory of %d entries is too large", len(entries))
	}
	l.nodes[d].size = uint32(size)
	return nil
}

// direntsInBlock returns how many of the entries fit into one directory block,
// and how many bytes of it they use.
func direntsInBlock(entries []imageDirent) (n, used int) {
	for _, e := range entries {
		need := erofsDirentSize + len(e.name)
		if used+need > erofsBlock {
			break
		}
		used += need
		n++
	}
	return n, used
}

// place gives each inode, directory and link its place.
func (l *imageLayout) place() error {
	at := int64(erofsSuperOffset + erofsSuperSize)
	for i := range l.nodes {
		n := &l.nodes[i]
		inode := n.inode(0)
		need := int64(inode.len()) + n.inlineSize(inode.len())
		if at%erofsBlock+need > erofsBlock {
			at = roundUp(at, erofsBlock) // neither inodes nor inline data cross blocks
		}
		n.nid = uint32(at / erofsSlot)
		at = roundUp(at+need, erofsSlot)
		if at > maxImageMeta {
			return fmt.Errorf("metadata of %d files passes %d bytes", len(l.nodes), int64(maxImageMeta))
		}
	}
	at = roundUp(at, erofsBlock)
	for i := range l.nodes {
		n := &l.nodes[i]
		if size := n.metaSize(); size > 0 && n.inlineSize(n.headLen()) == 0 {
			n.block = uint32(at / erofsBlock)
			at += roundUp(size, erofsBlock)
		}
		if at > maxImageMeta {
			return fmt.Errorf("metadata of %d files passes %d bytes", len(l.nodes), int64(maxImageMeta))
		}
	}
	l.meta = at
	return nil
}

// metaSize returns the bytes of the node's data that are metadata of the image.
func (n *imageNode) metaSize() int64 {
	switch n.entry.Kind {
	case nar.Directory:
		return int64(n.size)
	case nar.Symlink:
		return int64(len(n.entry.Target))
	}
	return 0
}

// inlineSize returns the bytes that follow the inode, of head bytes, in its
// block: all of the node's metadata if they fit, else none.
func (n *imageNode) inlineSize(head int) int64 {
	if size := n.metaSize(); size <= int64(erofsBlock-head) {
		return size
	}
	return 0
}

// headLen returns the size of the node's inode.
func (n *imageNode) headLen() int {
	inode := n.inode(0)
	return inode.len()
}

// inode returns the node's inode; block is where a file's contents begin.
func (n *imageNode) inode(block uint32) erofsInode {
	inode := erofsInode{links: n.links, block: block, size: n.metaSize()}
	switch n.entry.Kind {
	case nar.Directory:
		inode.mode = erofsModeDir
	case nar.Symlink:
		inode.mode = erofsModeSymlink
	case nar.Regular:
		inode.mode, inode.size = erofsModeFile, n.entry.Size
		if n.entry.Executable {
			inode.mode = erofsModeExecutable
		}
		return inode
	}
	inode.block = n.block
	if n.block == 0 {
		inode.layout = erofsInline
	}
	return inode
}

// fileType returns the node's type in directory entries.
func (n *imageNode) fileType() byte {
	switch n.entry.Kind {
	case nar.Directory:
		return erofsTypeDir
	case nar.Symlink:
		return erofsTypeSymlink
	}
	return erofsTypeFile
}

// roundUp returns the least multiple of unit, a power of two, from n up.
func roundUp(n, unit int64) int64 { return (n + unit - 1) &^ (unit - 1) }
