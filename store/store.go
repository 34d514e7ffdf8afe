package store

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"nbd/nixproto"
)

// Errors that callers branch on. They are wrapped with what they are about.
var (
	// ErrNotFound: there is no such thing, or it is not in the account's view.
	// The two cannot be told apart.
	ErrNotFound = errors.New("not found")
	// ErrExists: the name or key is taken.
	ErrExists = errors.New("already exists")
	// ErrInvalid: what was to be stored contradicts itself (a NAR that is
	// malformed or has another hash or size than claimed, a content address
	// or store path that does not recompute, a reference that is not valid).
	// The text says what, and is fit for a client.
	ErrInvalid = errors.New("invalid")
	// ErrInUse: a path cannot be deleted because others refer to it or
	// somebody uses it.
	ErrInUse = errors.New("in use")
	// ErrNoSpace: the disk is full, or less than Config.MinFree would remain.
	ErrNoSpace = errors.New("no space left in the store")
	// ErrDamaged: bytes on disk are not what was written.
	ErrDamaged = errors.New("damaged")
	// ErrLocked: another process has the state directory open.
	ErrLocked = errors.New("in use by another nbd")
	// ErrTooNew: the state directory was written by a newer nbd.
	ErrTooNew = errors.New("written by a newer nbd")
	// ErrClosed: the store was closed.
	ErrClosed = errors.New("store is closed")
)

// Config says how to open a store. The zero value works.
type Config struct {
	// ServerName is the first half of the names of signing keys made for new
	// accounts; "nbd" by default.
	ServerName string
	// MinFree is how many bytes of the file system uploads and outputs leave
	// free, so that the database can still be written and things deleted;
	// 64 MiB by default, negative for none.
	MinFree int64
	// KeepLogs is for how long logs of builds and uploaded ones are kept; the
	// oldest go earlier while less than twice MinFree is free. 0: for ever.
	KeepLogs time.Duration
	// PublicKeys are the operator's public keys of caches: what is signed by one
	// of them may be used by every account that trusts it, whoever brought it.
	// Default: none.
	PublicKeys []nixproto.PublicKey
	// Memory is how many bytes the requests under way may take together for
	// what they are about to store, see Charge; 512 MiB by default.
	Memory int64
	// Logger takes what an operator acts on; default: discarded.
	Logger *slog.Logger
	// Now is the clock; default: time.Now.
	Now func() time.Time
}

// withDefaults returns c with the defaults in place of zeros.
func (c Config) withDefaults() Config {
	if c.ServerName == "" {
		c.ServerName = "nbd"
	}
	if c.MinFree == 0 {
		c.MinFree = 64 << 20
	}
	if c.Memory == 0 {
		c.Memory = 512 << 20
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return c
}

// Store is one state directory. Its methods are safe for concurrent use.
type Store struct {
	dir string
	cfg Config
	log *slog.Logger
	db  *bolt.DB

	segs     *segments
	pins     *pins
	charges  *charges
	indexes  indexCache
	leases   leases
	logs     liveLogs
	verified verified
	// publicNames are the names of Config.PublicKeys; fixed by Open.
	publicNames map[string]bool
	builds      buildWrites
	tmpNames    atomic.Uint64
	settings    atomic.Pointer[Settings] // replaced with commitMu held

	queueMu sync.Mutex
	queue   []*commitRequest // waiting for a turn

	// commitMu is held by the one who changes the database or commits.
	commitMu sync.Mutex
	closed   bool // guarded by commitMu

	// pendingMu guards pending against readers; it is only changed with
	// commitMu held as well.
	pendingMu    sync.RWMutex
	pending      pending
	pendingCount atomic.Int64 // of pending, without a lock
	// flushes counts how often what was pending went into the database. It is
	// raised when it is there and before it ceases to be pending.
	flushes atomic.Uint64
	// removals counts the accounts that were removed, deletions the
	// transactions that deleted paths.
	removals, deletions atomic.Uint64
	flushWake           chan struct{}
	flushAfter          time.Duration // flushAfter, but in tests

	// sweep is set while Sweep looks for blobs that nobody has; guarded by
	// commitMu. One Sweep runs at a time, with sweepMu held.
	sweepMu sync.Mutex
	sweep   *sweep
	// collections are the deletions and collections under way; guarded by
	// commitMu. One GC runs at a time, with gcMu held.
	gcMu        sync.Mutex
	collections map[*collection]bool
	// strays are files of blobs that a failed commit may have left.
	straysMu sync.Mutex
	strays   map[sum]bool

	closing    chan struct{}
	background sync.WaitGroup
}

// lockTimeout is how long Open waits for another process to end.
const lockTimeout = 2 * time.Second

// Open opens the state directory dir, making it if needed, and recovers from
// whatever happened to the process that had it last. Errors: ErrLocked,
// ErrTooNew.
func Open(dir string, cfg Config) (*Store, error) {
	cfg = cfg.withDefaults()
	s := &Store{
		dir: dir, cfg: cfg, log: cfg.Logger,
		segs:      &segments{dir: filepath.Join(dir, "segments"), open: make(map[uint64]*segment), dirty: make(map[*segment]bool)},
		pins:      newPins(),
		charges:   newCharges(cfg.Memory),
		flushWake: make(chan struct{}, 1), flushAfter: flushAfter,
		strays:  make(map[sum]bool),
		closing: make(chan struct{}),
	}
	s.setPublicNames()
	if err := s.open(); err != nil {
		return nil, fmt.Errorf("open store in %s: %w", dir, err)
	}
	s.background.Add(1)
	go s.flusher()
	return s, nil
}

func (s *Store) open() error {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	db, err := bolt.Open(filepath.Join(s.dir, "nbd.db"), 0o600, &bolt.Options{
		Timeout:        lockTimeout,
		NoFreelistSync: true,
		FreelistType:   bolt.FreelistMapType,
		// Address space, so that a growing database is seldom mapped anew,
		// which has to wait for readers.
		InitialMmapSize: 1 << 30,
	})
	if errors.Is(err, berrors.ErrTimeout) {
		return ErrLocked
	}
	if err != nil {
		return databaseError(err)
	}
	s.db = db
	if err := s.recover(); err != nil {
		return errors.Join(err, s.segs.close(), db.Close())
	}
	return nil
}

// Close waits for writes that are under way, writes what is pending and closes
// the store. Open blobs and logs can be read until they are closed.
func (s *Store) Close() error {
	s.commitMu.Lock()
	if s.closed {
		s.commitMu.Unlock()
		return nil
	}
	err := s.closeBuildsLocked(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketMeta).Put(metaClean, []byte{1})
	})
	s.closed = true
	s.commitMu.Unlock()
	close(s.closing)
	s.background.Wait()
	if err = errors.Join(err, s.segs.close(), s.db.Close()); err != nil {
		return fmt.Errorf("close store in %s: %w", s.dir, err)
	}
	return nil
}

// CheckRoom returns ErrNoSpace if n more bytes, which the caller is about to
// write beside the store, would leave less than Config.MinFree.
func (s *Store) CheckRoom(n int64) error { return s.room(n) }

// room returns ErrNoSpace if n more bytes would leave less than
// Config.MinFree.
func (s *Store) room(n int64) error {
	if s.cfg.MinFree < 0 {
		return nil
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(s.dir, &fs); err != nil {
		return fmt.Errorf("free space of %s: %w", s.dir, err)
	}
	if int64(fs.Bavail)*fs.Bsize-n < s.cfg.MinFree {
		return fmt.Errorf("%w (%d MiB are kept free)", ErrNoSpace, s.cfg.MinFree>>20)
	}
	return nil
}
