package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// recentLog is the age up to which a log stays however full the disk is.
const recentLog = time.Hour

// A oldLog is the file of a log that may go.
type oldLog struct {
	path  string
	ended time.Time
	size  int64
}

// sweepLogs removes logs, of builds and uploaded ones, that are older than
// Config.KeepLogs, and the oldest of the others while less than twice
// Config.MinFree is free. Records of builds stay. It returns the bytes freed.
func (s *Store) sweepLogs(ctx context.Context) (freed uint64, err error) {
	logs, err := s.oldLogs(ctx)
	if err != nil {
		return 0, fmt.Errorf("sweep logs: %w", err)
	}
	slices.SortFunc(logs, func(a, b oldLog) int { return cmp.Or(a.ended.Compare(b.ended), cmp.Compare(a.path, b.path)) })
	now := s.cfg.Now()
	for _, l := range logs {
		tooOld := s.cfg.KeepLogs > 0 && now.Sub(l.ended) > s.cfg.KeepLogs
		if !tooOld && (s.cfg.MinFree <= 0 || s.room(s.cfg.MinFree) == nil) {
			break // the others are younger
		}
		if err := errors.Join(ctx.Err(), os.Remove(l.path)); err != nil {
			return freed, fmt.Errorf("sweep logs: %w", err)
		}
		freed += uint64(l.size)
	}
	return freed, nil
}

// oldLogs lists the logs that nobody writes and that are not recent.
func (s *Store) oldLogs(ctx context.Context) (logs []oldLog, err error) {
	now := s.cfg.Now()
	for _, top := range []string{"logs", "drvlogs"} {
		err := filepath.WalkDir(filepath.Join(s.dir, top), func(path string, e fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // replaced by a compressed one, or its account was removed
			}
			if err = cmp.Or(err, ctx.Err()); err != nil || e.IsDir() || s.isLive(path) {
				return err
			}
			info, err := e.Info()
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err == nil && now.Sub(info.ModTime()) > recentLog {
				logs = append(logs, oldLog{path, info.ModTime(), info.Size()})
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return logs, nil
}

// isLive reports whether a file is the log of a build that goes on.
func (s *Store) isLive(path string) bool {
	name, _ := strings.CutSuffix(filepath.Base(path), ".zst")
	number, isLog := strings.CutSuffix(name, ".log")
	id, err := strconv.ParseUint(number, 10, 64)
	if !isLog || err != nil {
		return false
	}
	s.logs.mu.Lock()
	defer s.logs.mu.Unlock()
	return s.logs.logs[BuildID(id)] != nil
}
