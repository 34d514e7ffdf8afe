// Package store is what is on disk.
package store
