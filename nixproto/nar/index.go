package nar

import (
	"encoding/binary"
	"slices"
	"strings"
)

// An Index is what an archive holds, in the archive's order: the root first,
// and each directory before its entries, which are sorted bytewise by name.
// Names and targets may share memory with one another.
type Index []Entry

// Lookup returns the position of the entry at a path below the root, "" or
// "." for the root itself, with slashes between names. It follows no symbolic
// link.
func (x Index) Lookup(path string) (i int, ok bool) {
	if len(x) == 0 {
		return 0, false
	}
	if path == "" || path == "." {
		return 0, true
	}
	for name := range strings.SplitSeq(path, "/") {
		if i, ok = x.child(i, name); !ok {
			return 0, false
		}
	}
	return i, true
}

// child returns the position of the entry of directory i with that name.
func (x Index) child(i int, name string) (int, bool) {
	depth := x[i].Depth + 1
	for j := i + 1; j < len(x) && x[j].Depth >= depth; j++ {
		if x[j].Depth == depth && x[j].Name == name {
			return j, true
		}
	}
	return 0, false
}

// Path returns the path of entry i below the root, with slashes between names;
// "" for the root.
func (x Index) Path(i int) string {
	var names []string
	for depth := x[i].Depth; depth > 0; i-- {
		if x[i].Depth == depth {
			names = append(names, x[i].Name)
			depth--
		}
	}
	slices.Reverse(names)
	return strings.Join(names, "/")
}

// NARSize returns the size in bytes of the archive that x is the index of.
func (x Index) NARSize() int64 {
	var l layout
	for i := range x {
		l.next(&x[i])
	}
	return l.end()
}

// indexVersion is the first byte of an encoded index.
const indexVersion = 1

// The first byte of an encoded entry: its kind in the lowest two bits, the
// executable bit, and above them how many directories end before it. A number
// of manyEnds says that the number of further ends follows as a uvarint.
const (
	executableBit = 1 << 2
	endsShift     = 3
	manyEnds      = 0xff >> endsShift
)

// AppendBinary appends the encoding of x to b. It is a version byte, the number
// of entries, and for each entry a byte (above), its name unless it is the root,
// and the size of a file or the target of a symbolic link; numbers and lengths
// are uvarints. Offsets follow from the rest. It is the caller's part that x
// comes from a Parser, from DecodeIndex, or is as well-formed.
//
// It takes about five bytes an entry beside the name. It returns no error; the
// result is that of encoding.BinaryAppender.
func (x Index) AppendBinary(b []byte) ([]byte, error) {
	b = append(b, indexVersion)
	b = binary.AppendUvarint(b, uint64(len(x)))
	open := 0 // directories that have not ended
	for i := range x {
		e := &x[i]
		b = appendHead(b, e, open-e.Depth)
		if i > 0 {
			b = appendString(b, e.Name)
		}
		open = e.Depth
		switch e.Kind {
		case Directory:
			open++
		case Regular:
			b = binary.AppendUvarint(b, uint64(e.Size))
		case Symlink:
			b = appendString(b, e.Target)
		}
	}
	return b, nil
}

// appendHead appends the first byte of an entry, and the number of directories
// that end before it if the byte cannot hold it.
func appendHead(b []byte, e *Entry, ends int) []byte {
	head := byte(e.Kind)
	if e.Executable {
		head |= executableBit
	}
	b = append(b, head|byte(min(ends, manyEnds))<<endsShift)
	if ends >= manyEnds {
		b = binary.AppendUvarint(b, uint64(ends-manyEnds))
	}
	return b
}

func appendString(b []byte, s string) []byte {
	b = binary.AppendUvarint(b, uint64(len(s)))
	return append(b, s...)
}

// DecodeIndex reads what AppendBinary made. It refuses what no archive could
// have as its index, in the same strictness as a Parser, and bytes that
// AppendBinary would not have written; its memory is bounded by the length of
// b. Whoever reads by the offsets of a stored index should first compare
// NARSize with the size of the archive. The Index shares no memory with b.
func DecodeIndex(b []byte) (Index, error) {
	d := decoder{s: string(b)}
	if d.byte() != indexVersion {
		return nil, malformed("index of an unknown version")
	}
	n := d.uvarint()
	if n == 0 || n > uint64(len(b)) { // an entry takes two bytes and more
		return nil, malformed("index of %d entries in %d bytes", n, len(b))
	}
	x := make(Index, n)
	var (
		l    layout
		last [MaxDepth + 1]string // as in Parser
		open int
	)
	for i := range x {
		e := &x[i]
		d.entry(e, open, i == 0)
		if d.err == nil && i > 0 {
			d.err = checkOrder(e, &last)
		}
		if d.err != nil {
			return nil, d.err
		}
		open = e.Depth
		if e.Kind == Directory {
			last[open] = ""
			open++
		}
		if e.Offset = l.next(e); l.size > maxSize {
			return nil, malformed("archive of %d bytes", l.size)
		}
	}
	if d.s != "" {
		return nil, malformed("%d bytes after index", len(d.s))
	}
	return x, nil
}

// checkOrder checks the name of e, and that it follows the one before.
func checkOrder(e *Entry, last *[MaxDepth + 1]string) error {
	if err := checkName(e.Name); err != nil {
		return err
	}
	before := &last[e.Depth-1]
	if e.Name <= *before {
		return malformed("name %q after %q", e.Name, *before)
	}
	*before = e.Name
	return nil
}

// A decoder takes the fields of an encoded index from s. Its error stays.
type decoder struct {
	s   string
	err error
}

// entry takes an entry; open directories have not ended before it.
func (d *decoder) entry(e *Entry, open int, root bool) {
	head := d.byte()
	ends := uint64(head >> endsShift)
	if ends == manyEnds {
		ends += min(d.uvarint(), MaxDepth+1)
	}
	e.Kind = Kind(head & (executableBit - 1))
	e.Executable = head&executableBit != 0
	switch {
	case root && ends > 0, !root && ends >= uint64(open):
		d.fail("index has no directory for an entry")
		return
	case e.Executable && e.Kind != Regular:
		d.fail("executable %v", e.Kind)
		return
	}
	e.Depth = open - int(ends)
	if e.Depth > MaxDepth {
		d.fail("nested deeper than %d", MaxDepth)
		return
	}
	if !root {
		e.Name = d.string()
	}
	switch e.Kind {
	case Directory:
	case Regular:
		n := d.uvarint()
		if n > maxSize {
			d.fail("file of %d bytes", n)
		}
		e.Size = int64(n)
	case Symlink:
		e.Target = d.string()
		if err := checkTarget(e.Target); d.err == nil {
			d.err = err
		}
	default:
		d.fail("unknown kind of entry")
	}
}

func (d *decoder) fail(format string, args ...any) {
	if d.err == nil {
		d.err = malformed(format, args...)
	}
}

func (d *decoder) byte() byte {
	if d.s == "" {
		d.fail("index ends early")
		return 0
	}
	c := d.s[0]
	d.s = d.s[1:]
	return c
}

// uvarint takes a number in its shortest form.
func (d *decoder) uvarint() uint64 {
	var n uint64
	for shift := uint(0); shift < 64; shift += 7 {
		c := d.byte()
		n |= uint64(c&0x7f) << shift
		if c < 0x80 {
			if (c == 0 && shift > 0) || (shift == 63 && c > 1) {
				break
			}
			return n
		}
	}
	d.fail("bad number in index")
	return 0
}

func (d *decoder) string() string {
	n := d.uvarint()
	if n > uint64(len(d.s)) {
		d.fail("index ends early")
	}
	if d.err != nil {
		return ""
	}
	s := d.s[:n]
	d.s = d.s[n:]
	return s
}

// A layout counts the bytes of an archive from its entries.
type layout struct {
	size int64 // up to the end of the latest entry's body
	open int   // directories that have not ended
	any  bool
}

// next adds the entry that follows, and returns the offset of the contents of
// a regular file, 0 for another entry.
func (l *layout) next(e *Entry) (offset int64) {
	l.close(e.Depth)
	if !l.any {
		l.size = int64(len(magic))
		l.any = true
	} else {
		l.size += int64(len(entry)+len(entryName)+len(nameNode)-len(nodeOpen)) + stringSize(len(e.Name))
	}
	l.size += int64(len(nodeOpen))
	switch e.Kind {
	case Directory:
		l.size += int64(len(directory))
		l.open++
		return 0
	case Symlink:
		l.size += int64(len(symlink)+len(target)) + stringSize(len(e.Target))
	case Regular:
		l.size += int64(len(regular) + len(contents) + 8)
		if e.Executable {
			l.size += int64(len(executable))
		}
		offset = l.size
		l.size += e.Size + pad(e.Size)
	}
	l.size += int64(len(closing))
	if e.Depth > 0 {
		l.size += int64(len(closing))
	}
	return offset
}

// close ends directories until so many are open.
func (l *layout) close(open int) {
	for ; l.open > open; l.open-- {
		l.size += int64(len(closing))
		if l.open > 1 { // the root is in no entry
			l.size += int64(len(closing))
		}
	}
}

// end returns the size of the archive after its last entry.
func (l *layout) end() int64 {
	l.close(0)
	return l.size
}

// stringSize returns the size of a short string with its length and padding.
func stringSize(n int) int64 { return 8 + int64(n) + pad(int64(n)) }
