package store

import (
	"errors"
	"log/slog"
	"time"
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

// Config says how to open a store. The zero value works, but for ServerName.
type Config struct {
	// ServerName is the first half of the names of signing keys made for new
	// accounts; "nbd" by default.
	ServerName string
	// MinFree is how many bytes of the file system uploads and outputs leave
	// free, so that the database can still be written and things deleted;
	// 64 MiB by default, negative for none.
	MinFree int64
	// Logger takes what an operator acts on; default: discarded.
	Logger *slog.Logger
	// Now is the clock; default: time.Now.
	Now func() time.Time
}
