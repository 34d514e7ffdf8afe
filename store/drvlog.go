package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"nbd/nixproto"
)

// PutLog stores the log that a client uploaded for the derivation with that
// base name, in the account's view; it replaces an earlier one. The derivation
// need not be in the view. The log has no bound here.
func (s *Store) PutLog(ctx context.Context, a AccountID, drvBase string, log io.Reader) error {
	if err := s.putLog(a, drvBase, log); err != nil {
		return fmt.Errorf("store log of %.300s: %w", drvBase, diskError(err))
	}
	return nil
}

func (s *Store) putLog(a AccountID, drvBase string, log io.Reader) error {
	path, err := s.drvLogPath(a, drvBase)
	if err != nil {
		return err
	}
	if err := errors.Join(s.checkAccount(a), s.room(0)); err != nil {
		return err
	}
	if err := os.Mkdir(s.drvLogDir(a), 0o700); err == nil {
		err = syncDir(filepath.Join(s.dir, "drvlogs"))
		if err != nil {
			return err
		}
	} else if !errors.Is(err, fs.ErrExist) {
		return err
	}
	return s.storeCompressed(path, log)
}

// drvLogPath returns the file of an uploaded log. A base name that is no store
// path's, or not that of a derivation, is ErrInvalid.
func (s *Store) drvLogPath(a AccountID, drvBase string) (string, error) {
	p, err := nixproto.ParseBaseName(drvBase)
	if err == nil && !p.IsDerivation() {
		err = errors.New("not a derivation")
	}
	if err != nil {
		return "", fmt.Errorf("%w name: %w", ErrInvalid, err)
	}
	return filepath.Join(s.drvLogDir(a), p.Base()+".zst"), nil
}

// Log returns the log that was uploaded for a derivation, or ErrNotFound. The
// caller closes it.
func (s *Store) Log(ctx context.Context, a AccountID, drvBase string) (io.ReadCloser, error) {
	path, err := s.drvLogPath(a, drvBase)
	if err == nil {
		err = s.checkAccount(a)
	}
	var r io.ReadCloser
	if err == nil {
		r, err = openCompressed(path)
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("log of %.300s: %w", drvBase, err)
	}
	return r, nil
}
