package nixproto

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
)

// The wire of both protocols, of NARs and of export streams knows integers of
// eight bytes, little endian, and strings: a length, the bytes, zeros up to a
// multiple of eight. Everything else is put together from these two.

// MaxMessage bounds what one message (a request, an answer, a log message) may
// bring into memory, in bytes; strings count with their headers. Streams that
// follow a message are not part of it.
const MaxMessage = 32 << 20

const (
	maxPathText = 4096    // longest text read where a path is expected
	maxSmall    = 1 << 16 // longest name, version, signature, content address

	// What an item of a list, of a map, and of a list of structs costs beside
	// its bytes.
	stringCost = 32
	entryCost  = 96
	structCost = 256

	// uncounted is by how much a message grows between looks at an Account.
	uncounted = 64 << 10

	smallBuffer = 4 << 10
	largeBuffer = 512 << 10
)

// ErrMalformed is wrapped by all errors that say that bytes break the rules of
// the wire. After one of them nothing is known of what follows: the connection
// has to be closed.
var ErrMalformed = errors.New("malformed bytes on the wire")

// A ValueError says that a message was read completely, but a value in it is
// not acceptable, such as a path in another store. The reader stands behind the
// message, so an answer can be sent and the connection goes on.
type ValueError struct{ Err error }

func (e *ValueError) Error() string { return e.Err.Error() }
func (e *ValueError) Unwrap() error { return e.Err }

// A Source lends the bytes of a stream without copying them. *Reader and
// *FramedReader are Sources; whoever takes one consumes exactly what belongs to
// it. A Source has one user at a time.
type Source interface {
	// Peek returns unread bytes, at least one, waiting for some if there are
	// none. At the end of the stream it returns io.EOF. The bytes stay valid
	// until Peek is called while Ready is false.
	Peek() ([]byte, error)
	// Discard consumes n bytes, at most as many as Peek returned last.
	Discard(n int)
	// Ready reports whether Peek will return without reading from the
	// connection. As long as it is true, slices that Peek returned earlier stay
	// valid, so that several can be written with one system call.
	Ready() bool
}

// A Reader decodes the wire. Its error is sticky: after the first failure all
// methods return zero values and Err returns the failure. It starts with a
// small buffer, takes a large one while much arrives, and gives it back in
// Await. It is for one goroutine at a time.
type Reader struct {
	src  Source
	err  error // of the stream
	bad  error // first value refused in the current message
	left int   // what the current message may still bring into memory

	account Account // nil: messages are not counted
	counted int64   // of the current message
}

// An Account counts the memory that messages take; *store.Charge. Set says how
// many bytes the current one takes, and is called often; its error, which is
// the Reader's then, says that so much cannot be had. Setting less succeeds.
type Account interface{ Set(n int64) error }

// Count makes a count the memory of messages, those of framed streams that are
// opened later as well. A message is counted until the next one begins, or
// Forget is called.
func (r *Reader) Count(a Account) { r.account = a }

// Forget says that nothing of the latest message is in memory any more.
func (r *Reader) Forget() {
	if r.counted != 0 {
		r.counted = 0
		_ = r.account.Set(0) // setting less succeeds
	}
}

// NewReader returns a Reader of r. It reads ahead, so r belongs to it from now on.
func NewReader(r io.Reader) *Reader {
	return &Reader{src: &buffer{r: r, small: make([]byte, smallBuffer)}}
}

// Await blocks until an unread byte is there, without consuming it, and keeps no
// large buffer while it waits. It returns io.EOF at the end of the stream and
// the error of a broken one. It suits the pause between two requests, and
// watching for a client that goes away while its request is worked on.
func (r *Reader) Await() error {
	if b, ok := r.src.(*buffer); ok {
		b.shrink()
	}
	_, err := r.Peek()
	return err
}

// Peek implements Source.
func (r *Reader) Peek() ([]byte, error) {
	if r.err != nil {
		return nil, r.err
	}
	return r.src.Peek()
}

// Discard implements Source.
func (r *Reader) Discard(n int) { r.src.Discard(n) }

// Ready implements Source.
func (r *Reader) Ready() bool { return r.err != nil || r.src.Ready() }

// Read implements io.Reader over the raw bytes.
func (r *Reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	b, err := r.Peek()
	if err != nil {
		return 0, err
	}
	n := copy(p, b)
	r.Discard(n)
	return n, nil
}

// Err returns the failure of the stream, or else the *ValueError of a value
// refused since the last message began.
func (r *Reader) Err() error {
	if r.err != nil {
		return r.err
	}
	if r.bad != nil {
		return &ValueError{r.bad}
	}
	return nil
}

// Fail makes err the sticky error, unless there is one already.
func (r *Reader) Fail(err error) {
	if r.err == nil {
		r.err = err
	}
}

// Uint64 reads an integer.
func (r *Reader) Uint64() uint64 {
	r.begin()
	return r.u64()
}

// Bool reads a boolean; any number but 0 is true.
func (r *Reader) Bool() bool { return r.Uint64() != 0 }

// Bytes reads a string of at most max bytes; a longer one is a failure.
func (r *Reader) Bytes(max int) []byte {
	r.begin()
	return r.bytes(max)
}

// Str reads a string of at most max bytes; a longer one is a failure.
func (r *Reader) Str(max int) string {
	r.begin()
	return r.str(max)
}

// Strings reads a list of at most maxItems strings of at most maxLen bytes each,
// MaxMessage in all.
func (r *Reader) Strings(maxItems, maxLen int) []string {
	r.begin()
	return r.list(maxItems, maxLen)
}

// StorePath reads a store path; one that is not well-formed is a *ValueError.
func (r *Reader) StorePath() StorePath {
	r.begin()
	return r.path()
}

// OptPath reads a store path or an empty string.
func (r *Reader) OptPath() StorePath {
	r.begin()
	return r.optPath()
}

// Paths reads a set of store paths and returns it sorted, without duplicates.
func (r *Reader) Paths() []StorePath {
	r.begin()
	return r.paths()
}

// StringMap reads a map of strings, MaxMessage in all. A key that comes twice is
// a *ValueError.
func (r *Reader) StringMap() map[string]string {
	r.begin()
	return r.stringMap()
}

// begin starts a new message: its budget is whole, no value is refused yet.
func (r *Reader) begin() {
	r.Forget()
	r.left = MaxMessage
	r.bad = nil
}

// malformed records a violation of the wire's rules.
func (r *Reader) malformed(format string, args ...any) {
	r.Fail(fmt.Errorf("%w: "+format, append([]any{ErrMalformed}, args...)...))
}

// reject records a value that is in step with the wire but not acceptable.
func (r *Reader) reject(err error) {
	if r.bad == nil {
		r.bad = err
	}
}

// charge takes n bytes from the message's budget and reports whether they were
// there.
func (r *Reader) charge(n uint64) bool {
	if r.err != nil {
		return false
	}
	if n > uint64(r.left) {
		r.malformed("a message is longer than %d bytes", MaxMessage)
		return false
	}
	r.left -= int(n)
	if used := int64(MaxMessage - r.left); r.account != nil && used > r.counted+uncounted {
		if err := r.account.Set(used); err != nil {
			r.Fail(err)
			return false
		}
		r.counted = used
	}
	return true
}

// full fills p from the stream; an end before that is io.ErrUnexpectedEOF.
func (r *Reader) full(p []byte) {
	for len(p) > 0 {
		b := r.more()
		if b == nil {
			return
		}
		n := copy(p, b)
		r.src.Discard(n)
		p = p[n:]
	}
}

// more is Peek inside a value: an end is a failure, and then it returns nil.
func (r *Reader) more() []byte {
	if r.err != nil {
		return nil
	}
	b, err := r.src.Peek()
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		r.Fail(err)
		return nil
	}
	return b
}

func (r *Reader) u64() uint64 {
	if b := r.more(); len(b) >= 8 {
		v := binary.LittleEndian.Uint64(b)
		r.src.Discard(8)
		return v
	}
	var raw [8]byte
	r.full(raw[:])
	if r.err != nil {
		return 0
	}
	return binary.LittleEndian.Uint64(raw[:])
}

// length reads the length of a string and takes it from the budget.
func (r *Reader) length(max int) int {
	n := r.u64()
	if n > uint64(max) {
		r.malformed("a string of %d bytes where at most %d are allowed", n, max)
		return 0
	}
	if !r.charge(n) {
		return 0
	}
	return int(n)
}

func (r *Reader) bytes(max int) []byte {
	n := r.length(max)
	// Memory follows the bytes that arrive, not the length that was claimed.
	out := make([]byte, 0, min(n, 64<<10))
	for len(out) < n {
		b := r.more()
		if b == nil {
			return nil
		}
		b = b[:min(len(b), n-len(out))]
		out = append(out, b...)
		r.src.Discard(len(b))
	}
	r.padding(n)
	return out
}

func (r *Reader) str(max int) string {
	n := r.length(max)
	if n == 0 {
		return ""
	}
	// Nearly all strings lie in the buffer as a whole.
	if b := r.more(); len(b) >= n {
		s := string(b[:n])
		r.src.Discard(n)
		r.padding(n)
		return s
	}
	out := make([]byte, 0, min(n, 64<<10))
	for len(out) < n {
		b := r.more()
		if b == nil {
			return ""
		}
		b = b[:min(len(b), n-len(out))]
		out = append(out, b...)
		r.src.Discard(len(b))
	}
	r.padding(n)
	return string(out)
}

// padding reads the zeros behind a string of n bytes.
func (r *Reader) padding(n int) {
	var pad [8]byte
	p := pad[:-n&7]
	r.full(p)
	if r.err == nil && pad != [8]byte{} {
		r.malformed("padding that is not zero")
	}
}

// count reads the number of items of a list and takes cost for each of them
// from the budget.
func (r *Reader) count(max int, cost uint64) int {
	n := r.u64()
	if n > uint64(max) {
		r.malformed("a list of %d items where at most %d are allowed", n, max)
		return 0
	}
	if !r.charge(n * cost) {
		return 0
	}
	return int(n)
}

// maxItems is more items than any message has room for.
const maxItems = MaxMessage / 8

// list reads a list of strings in the order of the wire.
func (r *Reader) list(maxItems, maxLen int) []string {
	var out []string
	for range r.count(maxItems, stringCost) {
		out = append(out, r.str(maxLen))
		if r.err != nil {
			return nil
		}
	}
	return out
}

// set reads strings and brings them into order.
func (r *Reader) set(maxLen int) []string { return sortedSet(r.list(maxItems, maxLen)) }

func (r *Reader) path() StorePath {
	s := r.str(maxPathText)
	if r.err != nil {
		return ""
	}
	p, err := ParseStorePath(s)
	if err != nil {
		r.reject(err)
	}
	return p
}

func (r *Reader) optPath() StorePath {
	s := r.str(maxPathText)
	if s == "" {
		return ""
	}
	p, err := ParseStorePath(s)
	if err != nil {
		r.reject(err)
	}
	return p
}

func (r *Reader) paths() []StorePath {
	var out []StorePath
	for range r.count(maxItems, stringCost) {
		p := r.path()
		if r.err != nil {
			return nil
		}
		out = append(out, p)
	}
	return sortedSet(out)
}

func (r *Reader) stringMap() map[string]string {
	out := map[string]string{}
	for range r.count(maxItems, entryCost) {
		k := r.str(MaxMessage)
		v := r.str(MaxMessage)
		if r.err != nil {
			return nil
		}
		if _, twice := out[k]; twice {
			r.reject(fmt.Errorf("key %q comes twice", clip(k)))
		}
		out[k] = v
	}
	return out
}

// sortedSet sorts s in place unless it is sorted, and drops duplicates.
func sortedSet[T ~string](s []T) []T {
	if !slices.IsSorted(s) {
		slices.Sort(s)
	}
	return slices.Compact(s)
}

// A buffer reads ahead of its consumer: the Source of a connection.
type buffer struct {
	r     io.Reader
	small []byte
	large *[largeBuffer]byte // from largeBuffers, nil unless much arrives
	data  []byte             // unread part of small or large
	full  bool               // the last read left no room
	err   error              // comes after data
}

var largeBuffers = sync.Pool{New: func() any { return new([largeBuffer]byte) }}

func (b *buffer) Peek() ([]byte, error) {
	if len(b.data) == 0 {
		if err := b.fill(); err != nil {
			return nil, err
		}
	}
	return b.data, nil
}

func (b *buffer) Discard(n int) { b.data = b.data[n:] }

func (b *buffer) Ready() bool { return len(b.data) > 0 || b.err != nil }

// fill reads once. A read that filled the small buffer had more waiting behind
// it, so the next one gets a large buffer.
func (b *buffer) fill() error {
	if b.err != nil {
		return b.err
	}
	if b.full && b.large == nil {
		b.large = largeBuffers.Get().(*[largeBuffer]byte)
	}
	room := b.small
	if b.large != nil {
		room = b.large[:]
	}
	for range 100 {
		n, err := b.r.Read(room)
		b.data, b.err, b.full = room[:n], err, n == len(room)
		if n > 0 {
			return nil
		}
		if err != nil {
			return err
		}
	}
	b.err = io.ErrNoProgress
	return b.err
}

// shrink gives the large buffer back if nothing unread lies in it.
func (b *buffer) shrink() {
	if b.large != nil && len(b.data) == 0 {
		largeBuffers.Put(b.large)
		b.large, b.data, b.full = nil, nil, false
	}
}
