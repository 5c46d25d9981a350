"""New checkpoints from old ones: conversion between formats, and merging with its proof."""
