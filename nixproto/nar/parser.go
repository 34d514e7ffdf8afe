package nar

import (
	"encoding/binary"
	"fmt"
	"strings"
)

// Limits bounds what a Parser keeps in memory. A zero field stands for its
// default.
type Limits struct {
	// Entries is how many entries an archive may have: 4 Mi by default. An
	// entry takes 64 bytes while it is in an Index.
	Entries int
	// Text is how many bytes names and targets may have together: 256 MiB by
	// default.
	Text int64
	// EndOnly keeps no Index: who only wants to know where an archive ends, and
	// that it is well-formed, needs no memory for it.
	EndOnly bool
}

// entryMemory is how many bytes of memory an Entry takes.
const entryMemory = 64

// The defaults of Limits.
const (
	DefaultEntries = 4 << 20
	DefaultText    = 256 << 20
)

// withDefaults returns l with the defaults in place of zeros.
func (l Limits) withDefaults() Limits {
	if l.Entries == 0 {
		l.Entries = DefaultEntries
	}
	if l.Text == 0 {
		l.Text = DefaultText
	}
	return l
}

// A Parser takes the bytes of one archive in pieces and makes its Index. The
// zero Parser is ready, with the default Limits. It is used by one goroutine
// at a time.
//
// Its states, each named after what it waits for; every transition takes a
// number of bytes that is known when the state is entered:
//
//	magic → kind
//	kind → file | symlink | rest of "directory" → directory
//	directory → (entry) entry → name → kind
//	          → (its end) close
//	file → (contents) size | (executable) executable → size
//	size → contents → close
//	symlink → target
//	close, target → end | directory, one level up
type Parser struct {
	limits Limits
	state  state
	need   int   // bytes the state takes, but for contents
	rest   int64 // contents still to come
	offset int64 // bytes taken so far
	err    error

	held []byte // the beginning of what the state needs, from earlier pieces
	text strings.Builder
	used int64 // bytes of text in all

	depth int // of the entry that is being read, and of a directory's end
	// last holds, for each directory above, the name of its latest entry.
	last  [MaxDepth + 1]string
	index Index // with EndOnly the latest entry
	count int   // of entries
}

// NewParser returns a Parser with bounds of its own.
func NewParser(l Limits) *Parser { return &Parser{limits: l} }

// Feed takes bytes of the archive that follow those of earlier calls, and
// returns how many: all of p, or up to the archive's last byte. It keeps no
// reference to p. An error wraps ErrMalformed and stays.
func (p *Parser) Feed(b []byte) (n int, err error) {
	if p.err != nil {
		return 0, p.err
	}
	if p.state == stateStart {
		p.limits = p.limits.withDefaults()
		p.wait(stateMagic, len(magicNode))
	}
	for p.state != stateEnd {
		used, ok := p.step(b[n:])
		n += used
		if p.err != nil {
			p.err = fmt.Errorf("at byte %d: %w", p.offset, p.err)
			return n, p.err
		}
		if !ok {
			break
		}
	}
	return n, nil
}

// Done reports whether the whole archive was taken.
func (p *Parser) Done() bool { return p.state == stateEnd }

// Size returns how many bytes were taken so far.
func (p *Parser) Size() int64 { return p.offset }

// Index returns the entries of the archive once Done; before, those that were
// complete enough to have a name and a kind. The Parser does not change them
// any more. It is nil with Limits.EndOnly.
func (p *Parser) Index() Index {
	if p.limits.EndOnly {
		return nil
	}
	return p.index
}

// Memory returns how many bytes of memory the Index takes by now, about.
func (p *Parser) Memory() int64 {
	return int64(cap(p.index))*entryMemory + p.used
}

// Close says whether the archive ended: nil if Done, else the error of the
// bytes taken, or that some are missing.
func (p *Parser) Close() error {
	switch {
	case p.err != nil:
		return p.err
	case !p.Done():
		return fmt.Errorf("at byte %d: %w", p.offset, malformed("ends early"))
	}
	return nil
}

// A state is what a Parser waits for.
type state uint8

const (
	stateStart state = iota
	stateMagic
	stateKind
	stateDirectoryKind // the last eight bytes of the kind "directory"
	stateDirectory
	stateEntry
	stateName
	stateFile
	stateExecutable
	stateSize
	stateContents
	stateSymlink
	stateTarget
	stateClose
	stateEnd
)

// token returns s as it stands in an archive.
func token(s string) string {
	b := binary.LittleEndian.AppendUint64(nil, uint64(len(s)))
	b = append(b, s...)
	return string(append(b, make([]byte, pad(int64(len(s))))...))
}

// The tokens of the grammar, those that always follow one another joined.
var (
	magic      = token("nix-archive-1")
	open       = token("(")
	closing    = token(")")
	nodeOpen   = open + token("type")
	regular    = token("regular")
	symlink    = token("symlink")
	directory  = token("directory")
	executable = token("executable") + token("")
	contents   = token("contents")
	target     = token("target")
	entry      = token("entry")
	entryName  = open + token("name")
	nameNode   = token("node") + nodeOpen

	magicNode          = magic + nodeOpen
	restOfDirectory    = directory[short:]
	executableContents = executable[short:] + contents
)

// short is the length of the tokens that a choice is made by; of longer ones
// that much is compared, and the rest read afterwards.
const short = 16

// wait enters state s, which takes n bytes.
func (p *Parser) wait(s state, n int) { p.state, p.need = s, n }

// fail ends the parser.
func (p *Parser) fail(format string, args ...any) { p.err = malformed(format, args...) }

// step takes from b what the state needs and does its work; ok is false if b
// has not enough, and is taken whole.
func (p *Parser) step(b []byte) (used int, ok bool) {
	if p.state == stateContents {
		return p.skip(b)
	}
	if len(p.held) == 0 && len(b) >= p.need {
		used = p.need
		p.offset += int64(used)
		p.take(b[:used])
		return used, true
	}
	used = min(p.need-len(p.held), len(b))
	p.offset += int64(used)
	p.held = append(p.held, b[:used]...)
	if len(p.held) < p.need {
		return used, false
	}
	p.take(p.held)
	p.held = p.held[:0]
	return used, true
}

// skip passes over the contents of a file.
func (p *Parser) skip(b []byte) (used int, ok bool) {
	n := min(p.rest, int64(len(b)))
	p.rest -= n
	p.offset += n
	if p.rest > 0 {
		return int(n), false
	}
	p.waitClose(pad(p.index[len(p.index)-1].Size), 1)
	return int(n), true
}

// take does the work of a state with the bytes that it waited for.
func (p *Parser) take(b []byte) {
	switch p.state {
	case stateMagic:
		p.takeLiteral(b, magicNode, stateKind, short)
	case stateKind:
		p.takeKind(b)
	case stateDirectoryKind:
		p.takeLiteral(b, restOfDirectory, stateDirectory, short)
	case stateDirectory:
		p.takeDirectory(b)
	case stateEntry:
		p.takeLength(b, entryName, MaxNameLen, stateName, len(nameNode))
	case stateName:
		p.takeName(b)
	case stateFile:
		p.takeFile(b)
	case stateExecutable:
		p.takeLiteral(b, executableContents, stateSize, 8)
	case stateSize:
		p.takeSize(binary.LittleEndian.Uint64(b))
	case stateSymlink:
		p.takeLength(b, target, MaxTargetLen, stateTarget, 0)
	case stateTarget:
		p.takeTarget(b)
	case stateClose:
		p.takeClose(b)
	}
}

// takeLiteral wants the bytes of lit, and enters state s next.
func (p *Parser) takeLiteral(b []byte, lit string, s state, n int) {
	if string(b) != lit {
		p.fail("wanted %q", lit)
		return
	}
	p.wait(s, n)
}

// takeKind begins the entry whose name is in last.
func (p *Parser) takeKind(b []byte) {
	if p.count++; p.count > p.limits.Entries {
		p.err = fmt.Errorf("%w: %w: more than %d", ErrMalformed, ErrTooLarge, p.limits.Entries)
		return
	}
	e := Entry{Depth: p.depth}
	if p.depth > 0 {
		e.Name = p.last[p.depth-1]
	}
	switch string(b) {
	case regular:
		e.Kind = Regular
		p.wait(stateFile, short)
	case symlink:
		e.Kind = Symlink
		p.wait(stateSymlink, len(target)+8)
	case directory[:short]:
		e.Kind = Directory
		p.last[p.depth] = ""
		p.depth++
		p.wait(stateDirectoryKind, len(restOfDirectory))
	default:
		p.fail("unknown kind of entry")
		return
	}
	if p.limits.EndOnly {
		p.index = p.index[:0]
	}
	p.index = append(p.index, e)
}

// takeDirectory takes the end of a directory, or the beginning of an entry.
func (p *Parser) takeDirectory(b []byte) {
	switch string(b) {
	case closing:
		p.depth--
		p.waitClose(0, 0)
	case entry:
		if p.depth > MaxDepth {
			p.fail("nested deeper than %d", MaxDepth)
			return
		}
		p.wait(stateEntry, len(entryName)+8)
	default:
		p.fail("wanted an entry of a directory, or its end")
	}
}

// takeLength takes lit and the length of a text, at most most bytes, and enters
// state s, which takes that text, its padding and more bytes.
func (p *Parser) takeLength(b []byte, lit string, most uint64, s state, more int) {
	if string(b[:len(lit)]) != lit {
		p.fail("wanted %q", lit)
		return
	}
	n := binary.LittleEndian.Uint64(b[len(lit):])
	if n == 0 || n > most {
		p.fail("name or target of %d bytes", n)
		return
	}
	p.rest = int64(n)
	p.wait(s, int(p.rest+pad(p.rest))+more)
}

// takeName takes the name of an entry, up to the kind.
func (p *Parser) takeName(b []byte) {
	padded := len(b) - len(nameNode)
	if string(b[padded:]) != nameNode {
		p.fail("wanted the node of an entry")
		return
	}
	name := p.takeText(b[:padded])
	if p.err == nil {
		p.err = checkName(name)
	}
	if p.err != nil {
		return
	}
	last := &p.last[p.depth-1]
	if name <= *last { // which is "" before the first
		p.fail("name %q after %q", name, *last)
		return
	}
	*last = name
	p.wait(stateKind, short)
}

// takeText takes p.rest bytes and the padding that follows. Strings share
// blocks of memory, as an archive has very many and very short ones.
func (p *Parser) takeText(b []byte) string {
	n := int(p.rest)
	if !zero(b[n:]) {
		p.fail("padding is not zero")
		return ""
	}
	if p.used += int64(n); p.used > p.limits.Text {
		p.err = fmt.Errorf("%w: %w: names of more than %d bytes", ErrMalformed, ErrTooLarge, p.limits.Text)
		return ""
	}
	if p.text.Cap()-p.text.Len() < n {
		// Blocks grow with the archive: most are of a few entries.
		size := min(max(64, int(p.used)), 64<<10)
		p.text = strings.Builder{}
		p.text.Grow(max(size, n))
	}
	start := p.text.Len()
	p.text.Write(b[:n])
	return p.text.String()[start:]
}

// takeFile takes what follows the kind of a regular file.
func (p *Parser) takeFile(b []byte) {
	switch string(b) {
	case contents:
		p.wait(stateSize, 8)
	case executable[:short]:
		p.index[len(p.index)-1].Executable = true
		p.wait(stateExecutable, len(executableContents))
	default:
		p.fail("wanted the contents of a file")
	}
}

// maxSize is what no file and no archive reaches: offsets stay far from the
// end of their type.
const maxSize = 1 << 62

// takeSize takes the length of a file's contents.
func (p *Parser) takeSize(n uint64) {
	if n > maxSize || p.offset > maxSize {
		p.fail("file of %d bytes", n)
		return
	}
	e := &p.index[len(p.index)-1]
	e.Offset, e.Size = p.offset, int64(n)
	p.rest = int64(n)
	p.state = stateContents
}

// takeTarget takes the target of a symbolic link.
func (p *Parser) takeTarget(b []byte) {
	s := p.takeText(b)
	if p.err == nil {
		p.err = checkTarget(s)
	}
	p.index[len(p.index)-1].Target = s
	p.waitClose(0, 1)
}

// waitClose waits for padding, for the ends of so many nodes, and, below the
// root, for the end of the entry that holds them.
func (p *Parser) waitClose(padding int64, nodes int) {
	if p.depth > 0 {
		nodes++
	}
	if nodes == 0 {
		p.state = stateEnd
		return
	}
	p.wait(stateClose, int(padding)+nodes*len(closing))
}

// takeClose takes what waitClose waited for.
func (p *Parser) takeClose(b []byte) {
	padding := len(b) % len(closing)
	if !zero(b[:padding]) {
		p.fail("padding is not zero")
		return
	}
	for b = b[padding:]; len(b) > 0; b = b[len(closing):] {
		if string(b[:len(closing)]) != closing {
			p.fail("wanted the end of an entry")
			return
		}
	}
	if p.depth == 0 {
		p.state = stateEnd
		return
	}
	p.wait(stateDirectory, short)
}

// zero reports whether b has only zeros.
func zero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
