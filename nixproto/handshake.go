package nixproto

import (
	"errors"
	"fmt"
)

const (
	workerClientMagic = 0x6e697863
	workerServerMagic = 0x6478696f
	serveClientMagic  = 0x390c9deb
	serveServerMagic  = 0x5452eecb
)

// ErrMagic says that a peer does not speak the protocol at all.
var ErrMagic = errors.New("not a Nix protocol")

// Trust is what a worker says of its client.
type Trust uint64

// The values of Trust.
const (
	TrustUnknown Trust = iota
	Trusted
	NotTrusted
)

// A Hello is what one side of the worker protocol says of itself.
type Hello struct {
	Version  Version  // the highest it speaks
	Features []string // sorted; told from 1.38 on
	Nix      string   // of a server: free text, told from 1.33 on
	Trust    Trust    // of a server, told from 1.35 on
}

// A VersionError says that a peer's protocol is too old.
type VersionError struct {
	Protocol string // "worker" or "serve"
	Version  Version
	Min      Version
}

func (e *VersionError) Error() string {
	return fmt.Sprintf("version %s of the Nix %s protocol is too old, at least %s is needed (%s)",
		e.Version, e.Protocol, e.Min, releaseOf[e.Min])
}

// releaseOf names the first Nix release that speaks a minimal version.
var releaseOf = map[Version]string{MinWorker: "Nix 2.4", MinServe: "Nix 2.3"}

// ServerHandshake is the server's side of the worker protocol's beginning. It
// returns what the client said and the version that both speak. What comes next
// is up to the caller: a LogLast opens the connection, WriteError refuses the
// client with a text that it prints. The latter is due when the error is a
// *VersionError; after any other error nothing can be said.
func ServerHandshake(r *Reader, w *Writer, mine Hello) (theirs Hello, v Version, err error) {
	if err := readMagic(r, workerClientMagic); err != nil {
		return theirs, 0, err
	}
	// Nix up to 2.8 sends its version only after it has seen ours.
	w.Uint64(workerServerMagic)
	w.Uint64(uint64(mine.Version))
	if err := w.Flush(); err != nil {
		return theirs, 0, err
	}
	theirs.Version = r.version()
	v = min(mine.Version, theirs.Version)
	if r.err == nil && v >= 1<<8|38 {
		// Clients send their set first, and wait for ours before they go on.
		theirs.Features = r.set(maxSmall)
		w.Strings(mine.Features)
		if err := w.Flush(); err != nil {
			return theirs, v, err
		}
	}
	if v >= 1<<8|14 && r.u64() != 0 {
		r.u64() // the CPU that the client wants; obsolete
	}
	if v >= 1<<8|11 {
		r.u64() // whether to reserve space; obsolete
	}
	if r.err != nil {
		return theirs, v, fmt.Errorf("read handshake: %w", r.err)
	}
	if v >= 1<<8|33 {
		w.Str(mine.Nix)
	}
	if v >= 1<<8|35 {
		w.Uint64(uint64(mine.Trust))
	}
	if v < MinWorker {
		return theirs, v, &VersionError{"worker", theirs.Version, MinWorker}
	}
	return theirs, v, w.Err()
}

// ClientHandshake is the client's side of the worker protocol's beginning. It
// returns what the server said and the version that both speak. The server's
// log messages up to LogLast or LogError come next.
func ClientHandshake(r *Reader, w *Writer, mine Hello) (theirs Hello, v Version, err error) {
	w.Uint64(workerClientMagic)
	w.Uint64(uint64(mine.Version))
	if err := w.Flush(); err != nil {
		return theirs, 0, err
	}
	if err := readMagic(r, workerServerMagic); err != nil {
		return theirs, 0, err
	}
	theirs.Version = r.version()
	v = min(mine.Version, theirs.Version)
	if r.err == nil && v < MinWorker {
		return theirs, v, &VersionError{"worker", theirs.Version, MinWorker}
	}
	if v >= 1<<8|38 {
		w.Strings(mine.Features)
		if err := w.Flush(); err != nil {
			return theirs, v, err
		}
		theirs.Features = r.set(maxSmall)
	}
	w.Uint64(0) // CPU
	w.Uint64(0) // reserve space
	if err := w.Flush(); err != nil {
		return theirs, v, err
	}
	if v >= 1<<8|33 {
		theirs.Nix = r.str(maxSmall)
	}
	if v >= 1<<8|35 {
		theirs.Trust = Trust(r.u64())
	}
	if r.err != nil {
		return theirs, v, fmt.Errorf("read handshake: %w", r.err)
	}
	return theirs, v, nil
}

// ServeServerHandshake is the server's side of the serve protocol's beginning.
// It returns the version that both speak. A *VersionError is to be told on the
// channel's stderr: the protocol has no place for it.
func ServeServerHandshake(r *Reader, w *Writer, mine Version) (Version, error) {
	if err := readMagic(r, serveClientMagic); err != nil {
		return 0, err
	}
	w.Uint64(serveServerMagic)
	w.Uint64(uint64(mine))
	if err := w.Flush(); err != nil {
		return 0, err
	}
	return serveVersion(r, mine)
}

// ServeClientHandshake is the client's side of the serve protocol's beginning.
// It returns the version that both speak.
func ServeClientHandshake(r *Reader, w *Writer, mine Version) (Version, error) {
	w.Uint64(serveClientMagic)
	w.Uint64(uint64(mine))
	if err := w.Flush(); err != nil {
		return 0, err
	}
	if err := readMagic(r, serveServerMagic); err != nil {
		return 0, err
	}
	return serveVersion(r, mine)
}

func serveVersion(r *Reader, mine Version) (Version, error) {
	theirs := r.version()
	if r.err != nil {
		return 0, fmt.Errorf("read handshake: %w", r.err)
	}
	v := min(mine, theirs)
	if v < MinServe {
		return v, &VersionError{"serve", theirs, MinServe}
	}
	return v, nil
}

// readMagic returns io.EOF if nothing comes at all.
func readMagic(r *Reader, want uint64) error {
	if err := r.Await(); err != nil {
		return err
	}
	r.begin()
	if got := r.u64(); r.err != nil {
		return fmt.Errorf("read handshake: %w", r.err)
	} else if got != want {
		r.Fail(fmt.Errorf("%w: the stream begins with %#x", ErrMagic, got))
		return r.err
	}
	return nil
}

func (r *Reader) version() Version {
	n := r.u64()
	if n > 0xffff {
		r.malformed("version %#x", n)
		return 0
	}
	return Version(n)
}
