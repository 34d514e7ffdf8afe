package store

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"
)

// A Token opens an account to who knows it: "nbd_" and 32 random bytes in
// base64url. Only its SHA-256 is stored.
type Token struct {
	// ID is the SHA-256 in base64url. It tells nothing about the token.
	ID   string
	Name string // unique in the account
	// Permissions are those of Permissions that the token has.
	Permissions []string
	Created     time.Time
	// Expires is when it ends; zero means never.
	Expires time.Time
}

// tokenPrefix makes tokens known to those who look for leaked ones.
const tokenPrefix = "nbd_"

// A tokenRecord is the value of a token in the database.
type tokenRecord struct {
	Account     AccountID `json:"account"`
	Name        string    `json:"name"`
	Permissions []string  `json:"permissions"`
	Created     time.Time `json:"created"`
	Expires     time.Time `json:"expires,omitzero"`
}

func (r *tokenRecord) token(h []byte) Token {
	return Token{base64.RawURLEncoding.EncodeToString(h), r.Name, r.Permissions, r.Created, r.Expires}
}

// expired reports whether the token has ended.
func (r *tokenRecord) expired(now time.Time) bool {
	return !r.Expires.IsZero() && !now.Before(r.Expires)
}

// CheckTokenName reports why name cannot be that of a token: it is 1 to 64
// printable characters without space.
func CheckTokenName(name string) error {
	if name == "" || len(name) > 64 || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return errors.New("the name of a token has 1 to 64 characters, and no space among them")
	}
	return nil
}

// AddToken makes a token for an account, and returns its secret, which is not
// stored. Name, Permissions and Expires of t count. A name that another token of
// the account has is ErrExists, unless that one has expired; a bad name or an
// unknown permission is ErrInvalid.
func (s *Store) AddToken(ctx context.Context, a AccountID, t Token) (secret string, _ Token, err error) {
	var random [32]byte
	if _, err := rand.Read(random[:]); err != nil {
		return "", t, fmt.Errorf("add token: %w", err)
	}
	secret = tokenPrefix + base64.RawURLEncoding.EncodeToString(random[:])
	h := sha256.Sum256([]byte(secret))
	rec := &tokenRecord{a, t.Name, t.Permissions, s.cfg.Now(), t.Expires}
	err = s.update(func(tx *bolt.Tx) error {
		if _, err := getAccount(tx, a); err != nil {
			return err
		}
		return s.putToken(tx, h[:], rec)
	})
	if err != nil {
		return "", t, fmt.Errorf("add token: %w", err)
	}
	return secret, rec.token(h[:]), nil
}

func (s *Store) putToken(tx *bolt.Tx, h []byte, rec *tokenRecord) error {
	if err := CheckTokenName(rec.Name); err != nil {
		return fmt.Errorf("%w name: %w", ErrInvalid, err)
	}
	if rec.Permissions == nil {
		rec.Permissions = []string{}
	}
	for _, p := range rec.Permissions {
		if !slices.Contains(Permissions(), p) {
			return fmt.Errorf("%w permission %q: there are %q", ErrInvalid, p, Permissions())
		}
	}
	old, oldRec, err := findToken(tx, rec.Account, func(_ []byte, r *tokenRecord) bool { return r.Name == rec.Name })
	if err != nil {
		return err
	}
	if old != nil {
		if !oldRec.expired(s.cfg.Now()) {
			return fmt.Errorf("a token %q %w", rec.Name, ErrExists)
		}
		if err := tx.Bucket(bucketTokens).Delete(old); err != nil {
			return err
		}
	}
	return putJSON(tx.Bucket(bucketTokens), h, rec)
}

// AccountByToken returns the account that a token opens now. ErrNotFound is the
// one answer to what never was a token, has expired or was revoked.
func (s *Store) AccountByToken(ctx context.Context, secret string) (a Account, t Token, err error) {
	h := sha256.Sum256([]byte(secret))
	err = s.db.View(func(tx *bolt.Tx) error {
		var rec tokenRecord
		ok, err := getJSON(tx.Bucket(bucketTokens), h[:], &rec)
		if err == nil && (!ok || rec.expired(s.cfg.Now())) {
			err = ErrNotFound
		}
		if err != nil {
			return fmt.Errorf("token: %w", err)
		}
		acc, err := getAccount(tx, rec.Account)
		if err != nil {
			return err
		}
		a, t = acc.account(rec.Account), rec.token(h[:])
		return nil
	})
	return a, t, databaseError(err)
}

// Tokens lists the tokens of an account by name, expired ones too.
func (s *Store) Tokens(ctx context.Context, a AccountID) (list []Token, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		_, _, err := findToken(tx, a, func(h []byte, r *tokenRecord) bool {
			list = append(list, r.token(h))
			return false
		})
		return err
	})
	slices.SortFunc(list, func(a, b Token) int { return cmp.Compare(a.Name, b.Name) })
	return list, databaseError(err)
}

// RemoveToken ends the token of an account with a name, and returns it;
// ErrNotFound if there is none.
func (s *Store) RemoveToken(ctx context.Context, a AccountID, name string) (t Token, err error) {
	err = s.update(func(tx *bolt.Tx) error {
		h, rec, err := findToken(tx, a, func(_ []byte, r *tokenRecord) bool { return r.Name == name })
		if err != nil {
			return err
		}
		if h == nil {
			return fmt.Errorf("token %q: %w", name, ErrNotFound)
		}
		t = rec.token(h)
		return tx.Bucket(bucketTokens).Delete(h)
	})
	if err != nil {
		return Token{}, fmt.Errorf("remove token: %w", err)
	}
	return t, nil
}

// findToken returns the first token of an account that is the one; a nil key if
// none is.
func findToken(tx *bolt.Tx, a AccountID, is func(h []byte, r *tokenRecord) bool) ([]byte, *tokenRecord, error) {
	c := tx.Bucket(bucketTokens).Cursor()
	for h, v := c.First(); h != nil; h, v = c.Next() {
		var rec tokenRecord
		if err := decodeJSON(v, &rec); err != nil {
			return nil, nil, err
		}
		if rec.Account == a && is(h, &rec) {
			return slices.Clone(h), &rec, nil
		}
	}
	return nil, nil, nil
}

// removeTokens ends all tokens of an account.
func removeTokens(tx *bolt.Tx, a AccountID) error {
	var all [][]byte
	_, _, err := findToken(tx, a, func(h []byte, _ *tokenRecord) bool {
		all = append(all, slices.Clone(h))
		return false
	})
	if err != nil {
		return err
	}
	for _, h := range all {
		if err := tx.Bucket(bucketTokens).Delete(h); err != nil {
			return err
		}
	}
	return nil
}
